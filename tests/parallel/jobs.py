"""What single ranks do in the tests of this folder. Each job starts and ends its process groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from configs.run import RunConfig
from model.glam import GLaM
from parallel import groups
from parallel.engine import Engine, MicroBatch
from pretrain.build import make_topology, materialise
from pretrain.checkpoint import Checkpoints
from pretrain.health import fit_to_apply
from pretrain.state import TrainState
from slurm.environ import LaunchEnv
from tests.tiny import token_windows

Pieces = dict[str, tuple[tuple[int, ...], list[tuple[tuple[int, ...], Tensor]]]]


@contextmanager
def engine_on(env: LaunchEnv, config: RunConfig) -> Iterator[Engine]:
    topology = make_topology(config, env)
    timeout_s = min(60, config.cluster.collective_timeout_s)
    device = groups.start(env.rank, env.world_size, env.local_rank, env.master_addr, env.master_port, timeout_s)
    yield Engine(materialise(config, topology, groups.create(topology, tied_ends=True), device), config, device)
    groups.stop()


def batches(engine: Engine, config: RunConfig, step: int) -> list[MicroBatch]:
    """This rank's micro-batches of the global batch of a step."""
    windows = token_windows(config, config.train.batch_sequences, seed=100 + step)
    mine = windows.chunk(engine.topology.data)[engine.topology.data_rank]
    return [(part[:, :-1], part[:, 1:]) for part in mine.split(config.train.micro_batch_sequences)]


def pieces(engine: Engine) -> Pieces:
    """This rank's boxes of all tensors, copied."""
    return {
        name: (tuple(held.global_shape), [(box.offset, box.values.clone()) for box in held.boxes])
        for name, held in engine.tensors().items()
    }


def assemble(ranks: list[Pieces]) -> dict[str, Tensor]:
    """Whole tensors from the boxes of all ranks; every element comes from one, and copies are the same to the bit."""
    whole: dict[str, Tensor] = {}
    written: dict[str, Tensor] = {}
    for rank in ranks:
        for name, (shape, boxes) in rank.items():
            tensor = whole.setdefault(name, torch.full(shape, float("nan")))
            seen = written.setdefault(name, torch.zeros(shape, dtype=torch.bool))
            for offset, values in boxes:
                place = tuple(slice(o, o + n) for o, n in zip(offset, values.shape))
                assert torch.equal(tensor[place][seen[place]], values[seen[place]]), f"copies of {name} differ"
                tensor[place], seen[place] = values, True
    assert all(seen.all() for seen in written.values())
    return whole


def train_job(env: LaunchEnv, config: RunConfig, steps: int, lr: float = 1e-2) -> dict[str, Any]:
    """Train; returns each step's figures and the pieces after the first step."""
    with engine_on(env, config) as engine:
        figures, first = [], None
        for step in range(steps):
            result = engine.train_step(batches(engine, config, step), lr, fit_to_apply)
            figures.append((result.cross_entropy, result.grad_norm))
            first = first or pieces(engine)
        return {"figures": figures, "first": first}


def poison_job(env: LaunchEnv, config: RunConfig, bad_rank: int | None, where: str) -> dict[str, Any]:
    """Step 0 sound, step 1 poisoned on one rank, step 2 sound; without `bad_rank` step 1 is left out."""
    with engine_on(env, config) as engine:
        engine.train_step(batches(engine, config, 0), 1e-2, fit_to_apply)
        before, results = pieces(engine), []
        if bad_rank is not None:
            undo = poison(engine.model, where) if env.rank == bad_rank else (lambda: None)
            results.append(engine.train_step(batches(engine, config, 1), 1e-2, fit_to_apply))
            undo()
        after = pieces(engine)
        results.append(engine.train_step(batches(engine, config, 2), 1e-2, fit_to_apply))
        return {"before": before, "after": after, "last": pieces(engine), "results": results}


def poison(model: GLaM, where: str) -> Callable[[], None]:
    """Make one gradient, or the loss, not a number, wherever this rank holds it; returns how to undo it."""
    if where == "loss":
        original = model.norm.forward
        model.norm.forward = lambda x: original(x) * float("nan")  # type: ignore[method-assign]

        def undo() -> None:
            model.norm.forward = original  # type: ignore[method-assign]

        return undo
    block = model.moe_blocks()[0]
    assert block.moe is not None
    target = block.moe.experts.up if where == "expert gradient" else block.attention.query.weight
    return target.register_hook(lambda gradient: gradient * float("inf")).remove


def resume_job(env: LaunchEnv, config: RunConfig, folder: str, stop_at: int, steps: int) -> dict[str, Any]:
    """Go on from the folder's checkpoint if there is one; train to `stop_at` and save; or train to `steps`."""
    config = config.model_copy(update={"run_dir": folder})
    with engine_on(env, config) as engine:
        checkpoints = Checkpoints(config)
        restored = checkpoints.restore(engine)
        state = restored.state if restored else TrainState()
        figures = []
        while state.step < (steps if restored else stop_at):
            result = engine.train_step(batches(engine, config, state.step), 1e-2, fit_to_apply)
            figures.append((result.cross_entropy, result.grad_norm))
            state.step += 1
            state.updates += result.applied
        if stop_at < steps and not restored:
            checkpoints.save(engine, state)
            checkpoints.wait()
        weights = {name: parameter.detach().clone() for name, parameter in engine.part.owned_parameters().items()}
        evaluated = engine.evaluate(batches(engine, config, 99), engine.num_micro_batches)
        return {"figures": figures, "pieces": pieces(engine), "weights": weights, "evaluated": evaluated}


def dispatch_job(env: LaunchEnv, config: RunConfig) -> dict[str, Any]:
    """One mixture-of-experts layer, forward and backward, with its experts on other ranks."""
    topology = make_topology(config, env)
    groups.start(env.rank, env.world_size, env.local_rank, env.master_addr, env.master_port, 60)
    model = materialise(config, topology, groups.create(topology, tied_ends=True), torch.device("cpu")).model
    moe = model.moe_blocks()[0].moe
    assert moe is not None
    x = layer_input(config, env.rank).requires_grad_()
    y, _, _ = moe(x)
    y.square().sum().backward()
    experts = {name: parameter.grad for name, parameter in moe.experts.named_parameters()}
    groups.stop()
    return {"y": y.detach(), "x": x.grad, "experts": experts, "router": moe.router.weight.grad}


def layer_input(config: RunConfig, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(2, config.train.sequence_length, config.model.width, generator=generator)


def error_job(env: LaunchEnv, bad_rank: int) -> str:
    """One rank meets bad input; all must hear of it."""
    from configs.errors import UserError
    from parallel.collectives import raise_together

    groups.start(env.rank, env.world_size, env.local_rank, env.master_addr, env.master_port, 60)
    try:
        raise_together(UserError(f"rank {env.rank}", "e", "r") if env.rank >= bad_rank else None)
    except UserError as error:
        groups.stop()
        return error.found
    return "nothing"


def settings_job(env: LaunchEnv) -> tuple[str, bool]:
    """Rank 1 was started with another seed: what each rank is told, and whether a process group was made."""
    import torch.distributed as dist

    from configs.errors import UserError

    settings: dict[str, object] = {"train": {"seed": int(env.rank == 1), "steps": 5}}
    try:
        groups.start(env.rank, env.world_size, env.local_rank, env.master_addr, env.master_port, 20, settings)
    except UserError as error:
        return error.found, dist.is_initialized()
    return "", dist.is_initialized()


def imported_job(env: LaunchEnv) -> bool:
    """Whether this rank found ready what it would otherwise spend seconds on."""
    import sys

    return "torch._dynamo" in sys.modules and "deepspeed.runtime.zero.muon.muon_optimizer" in sys.modules


def fault_job(env: LaunchEnv) -> str:
    """Rank 2 alone has met bad input before the ranks meet."""
    from configs.errors import UserError

    fault = UserError("rank 2's disk is full", "room", "free some") if env.rank == 2 else None
    try:
        groups.start(env.rank, env.world_size, env.local_rank, env.master_addr, env.master_port, 20, {}, fault)
    except UserError as error:
        return error.found
    return ""
