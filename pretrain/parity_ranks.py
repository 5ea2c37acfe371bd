"""What the parity gate computes: the same few steps by plain PyTorch on one process, and by one rank of a layout."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.run import RunConfig
from model.glam import GLaM
from model.init import initial_value
from model.loss import language_model_loss
from parallel import checkpoint_store as store
from parallel import groups
from parallel.checkpoint_serial import LazyTensor, write_whole
from parallel.engine import Engine, MicroBatch
from parallel.fragments import TensorBoxes
from parallel.topology import Topology
from pretrain import build
from pretrain.health import fit_to_apply
from slurm.environ import LaunchEnv

Boxes = list[tuple[tuple[int, ...], Tensor]]  # offset in the whole tensor, values


@dataclass
class Figures:
    """What one side found. Per step, but for the router's figures and the gradients, which are of the first."""

    losses: list[float] = field(default_factory=list)  # cross-entropy, nats a token
    norms: list[float] = field(default_factory=list)  # of the gradient, before clipping
    balance: dict[int, float] = field(default_factory=dict)  # layer -> balance loss, without coefficient
    z: dict[int, float] = field(default_factory=dict)
    loads: list[dict[int, list[float]]] = field(default_factory=list)  # step -> layer -> kept choices of each expert
    heldout: float = 0.0  # cross-entropy of other tokens after the last step
    gradients: dict[str, Boxes] = field(default_factory=dict)  # mean over the batch, before clipping
    weights: dict[str, Boxes] = field(default_factory=dict)  # after the last step


# ---- what both sides share ------------------------------------------------------------------------------------------
def token_windows(config: RunConfig, step: int) -> Tensor:
    """The global batch of a step: random tokens [sequences, S + 1]."""
    generator = torch.Generator().manual_seed(config.train.seed * 1009 + step)
    shape = (config.train.batch_sequences, config.train.sequence_length + 1)
    return torch.randint(0, config.model.vocab_size, shape, generator=generator)


def seed_model(config: RunConfig) -> GLaM:
    """A whole model on this process. Vectors and tables, which start all equal, get values of their own, or a wrong
    slice of them would pass unseen."""
    with torch.device("meta"):
        model = GLaM(config.model)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(config.train.seed)
    for name, parameter in model.named_parameters():
        value = initial_value(name, tuple(parameter.shape), config.model, config.train.seed)
        if name.endswith((".table", ".scale")):
            value += 0.1 * torch.randn(value.shape, generator=generator)
        parameter.data.copy_(value)
    return model


def write_seed_checkpoint(config: RunConfig, folder: Path) -> None:
    """The weights every layout starts from; by this process alone, whatever ranks it has met."""
    weights = [
        LazyTensor(f"{name}/weight", tuple(parameter.shape), "float32", partial(parameter.detach().narrow, 0))
        for name, parameter in seed_model(config).named_parameters()
    ]
    write_whole(folder, weights, {"config": config.model_dump(mode="json")})


# ---- one process ----------------------------------------------------------------------------------------------------
def oracle(config: RunConfig, steps: int, device: str = "cpu") -> Figures:
    """The training without DeepSpeed, ranks, micro-batches or chunks: whole batch, autograd, torch's AdamW."""
    model, spec, found = seed_model(config).to(device), config.train.optimizer, Figures()
    parameters = dict(model.named_parameters())
    decayed = [p for n, p in parameters.items() if p.ndim >= 2 and not n.endswith("bias.table")]
    others = [p for n, p in parameters.items() if p.ndim < 2 or n.endswith("bias.table")]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=spec.peak_lr,
        betas=(spec.beta1, spec.beta2),
        eps=spec.epsilon,
    )
    for step in range(steps):
        windows = token_windows(config, step).to(device)
        model.cross_entropies.clear()
        hidden = model.hidden(windows[:, :-1])
        optimizer.zero_grad()
        model.loss(hidden, windows[:, 1:]).backward()  # type: ignore[no-untyped-call]
        if step == 0:
            found.gradients = {n: [((0,) * p.ndim, _copy(p.grad))] for n, p in parameters.items()}
        _note_routers(found, {layer: block.totals.take() for layer, block in model.moe_blocks().items()})
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip_norm or float("inf"))
        optimizer.step()
        found.losses.append(float(model.cross_entropies[0]))
        found.norms.append(float(norm))
    found.weights = {n: [((0,) * p.ndim, _copy(p))] for n, p in parameters.items()}
    with torch.no_grad():
        windows = token_windows(config, steps).to(device)
        model.eval()
        hidden = model.hidden(windows[:, :-1])
        label = windows[:, 1:].flatten()
        found.heldout = float(language_model_loss(hidden.flatten(0, 1), model.output_weight, label)[1])
    return found


# ---- one rank of a layout -------------------------------------------------------------------------------------------
def layout_job(env: LaunchEnv, config: RunConfig, seed_checkpoint: str, steps: int) -> Figures:
    """One rank, from joining its process groups to leaving them."""
    topology, device = build.make_topology(config, env), build.meet(config, env)
    found = run_layout(config, topology, device, seed_checkpoint, steps)
    groups.stop()
    return found


def run_layout(
    config: RunConfig,
    topology: Topology,
    device: torch.device,
    seed_checkpoint: str,
    steps: int,
    tamper: Callable[[Engine], None] = lambda engine: None,
) -> Figures:
    """A few steps of one layout on ranks that have met already.

    Args:
        tamper: for tests of the gate itself: spoils something in the engine before the first step.
    """
    with engine_of(config, topology, device, seed_checkpoint) as engine:
        tamper(engine)
        found = Figures()
        for step in range(steps):
            accept: Callable[[float, float], bool] = fit_to_apply
            if step == 0:

                def accept(cross_entropy: float, norm: float) -> bool:
                    found.gradients = _copies(engine.gradients())
                    return fit_to_apply(cross_entropy, norm)

            result = engine.train_step(micro_batches(config, topology, step), config.train.optimizer.peak_lr, accept)
            _note_routers(found, engine.router_loads())
            found.losses.append(result.cross_entropy)
            found.norms.append(result.grad_norm)
        held = engine.tensors()
        found.weights = _copies((n.removesuffix("/weight"), b) for n, b in held.items() if n.endswith("/weight"))
        # Every batch twice, which leaves the mean as it is: evaluation may take more micro-batches than a step has.
        found.heldout = engine.evaluate(micro_batches(config, topology, steps) * 2, engine.num_micro_batches * 2)
    return found


@contextmanager
def engine_of(config: RunConfig, topology: Topology, device: torch.device, seed_checkpoint: str) -> Iterator[Engine]:
    process_groups = groups.create(topology, tied_ends=config.model.tied_embedding)
    try:
        engine = Engine(build.materialise(config, topology, process_groups, device), config, device)
        weights = {name: boxes for name, boxes in engine.tensors().items() if name.endswith("/weight")}
        store.load(Path(seed_checkpoint), weights)
        engine.loaded(updates=0)
        yield engine
    finally:
        groups.forget_expert_groups()
        gc.collect()  # engines are knots of references; the next layout wants their memory


def micro_batches(config: RunConfig, topology: Topology, step: int) -> list[MicroBatch]:
    mine = token_windows(config, step).chunk(topology.data)[topology.data_rank]
    return [(part[:, :-1], part[:, 1:]) for part in mine.split(config.train.micro_batch_sequences)]


def _note_routers(found: Figures, taken: dict[int, Any]) -> None:
    found.loads.append({})
    for layer, totals in taken.items():
        *load_E, _, balance, z, passes = totals.tolist()
        found.loads[-1][layer] = load_E
        found.balance.setdefault(layer, balance / passes)
        found.z.setdefault(layer, z / passes)


def _copies(held: Any) -> dict[str, Boxes]:
    found: dict[str, Boxes] = {}
    boxes: TensorBoxes
    for name, boxes in held:
        found[name] = [(box.offset, _copy(box.values)) for box in boxes.boxes]
    return found


def _copy(values: Any) -> Tensor:
    copied: Tensor = values.detach().float().cpu().clone()
    return copied
