"""What single ranks do in the tests of the parity gate: many small trainings within one start of the ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch

from configs.run import RunConfig
from parallel import gradients, groups
from parallel.context import own_part
from parallel.engine import Engine
from pretrain.build import make_topology
from pretrain.health import fit_to_apply
from pretrain.parity_ranks import Figures, engine_of, micro_batches, run_layout
from slurm.environ import LaunchEnv

GATE_LAYOUTS = (
    "dp=2",
    "dp=2,zero=0",
    "tp=2",
    "pp=2",
    "ep=2,dp=2",
    "tp=2,pp=2",
    "pp=2,ep=2,dp=2",
    "tp=2,ep=2",
    "tp=2,pp=2,ep=2,dp=2",
)
CONTEXT_LAYOUTS = (
    "cp=2",
    "cp=2,ep=2",
    "cp=2,pp=2",
    "cp=2,tp=2",
    "cp=2,dp=2,zero=0",
)


def variants_job(env: LaunchEnv, configs: list[RunConfig], seeds: list[str], steps: int) -> list[Figures]:
    """The same ranks train one configuration after the other."""
    device = join(env)
    found = [
        run_layout(config, make_topology(config, env), device, seed, steps) for config, seed in zip(configs, seeds)
    ]
    groups.stop()
    return found


def join(env: LaunchEnv, timeout_s: float = 60) -> torch.device:
    return groups.start(env.rank, env.world_size, env.local_rank, env.master_addr, env.master_port, timeout_s)


# ---- planted faults -------------------------------------------------------------------------------------------------
def experts_counted_twice(engine: Engine) -> None:
    """Experts' gradients times the expert-parallel degree."""
    for block in engine.part.local_blocks().values():
        for parameter in block.moe.experts.parameters() if block.moe else ():
            parameter.register_hook(lambda gradient: gradient * engine.topology.expert)


def norms_left_partial(engine: Engine) -> None:
    """A norm weight whose gradient is not summed over tensor ranks."""
    engine._partial = [p for p in engine._partial if not engine._names[id(p)].endswith("_norm.scale")]


def routers_left_partial(engine: Engine) -> None:
    engine._partial = [p for p in engine._partial if ".router." not in engine._names[id(p)]]


def balance_counted_per_micro_batch(engine: Engine) -> None:
    """A balance loss that escapes the division by micro-batches."""
    for block in engine.part.local_blocks().values():
        block.aux_scale *= engine.num_micro_batches


def norm_without_experts(engine: Engine) -> None:
    """A gradient norm that misses experts (each rank is a process of its own, so nothing is put back)."""
    original = gradients.counted_here
    gradients.counted_here = lambda placed, *rest: not placed.is_expert and original(placed, *rest)


def embedding_not_tied(engine: Engine) -> None:
    """The last stage's gradient of a tied embedding never reaches the first."""
    engine._tied = None


def no_clipping(engine: Engine) -> None:
    engine._clip_norm = None
    engine._deepspeed.optimizer.clip_grad = 0.0


def heads_swapped(engine: Engine) -> None:
    """Two tensor ranks that read each other's slice of a checkpoint."""
    for number, block in engine.part.local_blocks().items():
        weight = block.attention.query.weight
        if number == 0:
            weight.data.copy_(weight.data.roll(1, 0))


def balance_divided_by_context(engine: Engine) -> None:
    """A balance loss that the mean over context ranks divides."""
    for block in engine.part.local_blocks().values():
        block.aux_scale /= engine.topology.context


def biases_of_the_first_heads(engine: Engine) -> None:
    """Context ranks that all take the position bias of the first one's heads."""
    for block in engine.part.local_blocks().values():
        assert block.attention.bias is not None
        count = len(block.attention.bias.own_heads())
        block.attention.bias.heads = slice(0, count)


def blocks_of_the_first_groups(engine: Engine) -> None:
    """Context ranks that all draw the random blocks of the first one's heads."""
    for block in engine.part.local_blocks().values():
        if block.attention.blocks is not None:
            block.attention.blocks.groups = range(len(block.attention.blocks.groups))


def documents_of_the_part(engine: Engine) -> None:
    """Stages that look for ends of documents in their part of the sequences only."""
    expect = engine.model.expect

    def cut(tokens: Iterable[torch.Tensor]) -> None:
        size = engine.topology.context
        expect(own_part(part, engine.topology).repeat(1, size) for part in tokens)

    engine.model.expect = cut  # type: ignore[method-assign]


FAULTS: dict[str, Callable[[Engine], None]] = {
    fault.__name__: fault
    for fault in (
        experts_counted_twice,
        norms_left_partial,
        routers_left_partial,
        balance_counted_per_micro_batch,
        norm_without_experts,
        embedding_not_tied,
        no_clipping,
        heads_swapped,
        balance_divided_by_context,
        biases_of_the_first_heads,
        blocks_of_the_first_groups,
        documents_of_the_part,
    )
}


def faulty_job(env: LaunchEnv, config: RunConfig, seed: str, steps: int, fault: str) -> Figures:
    found = run_layout(config, make_topology(config, env), join(env), seed, steps, tamper=FAULTS[fault])
    groups.stop()
    return found


# ---- work done ------------------------------------------------------------------------------------------------------
def counting_job(env: LaunchEnv, config: RunConfig, seed: str) -> dict[str, Counter[str]]:
    """How often each block ran forward and backward in one step."""
    calls: dict[str, Counter[str]] = {"forward": Counter(), "backward": Counter()}

    def count(kind: str, name: str) -> Callable[..., None]:
        return lambda *_: calls[kind].update([name])

    device = join(env)
    topology = make_topology(config, env)
    with engine_of(config, topology, device, seed) as engine:
        for number, block in engine.part.local_blocks().items():
            # The feed-forward half is entered once a forward pass, also when that is a recomputation.
            inner: Any = block.moe or block.ffn
            inner.register_forward_pre_hook(count("forward", f"block {number}"))
            block.attention.query.weight.register_hook(count("backward", f"block {number}"))
        engine.train_step(micro_batches(config, topology, 0), 1e-3, fit_to_apply)
    groups.stop()
    return calls
