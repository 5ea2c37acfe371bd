"""The proof that a layout trains as one process does: `glam parity`.

From one seed checkpoint and one stream of tokens each layout runs a few steps on gloo ranks, and every figure is held
against plain PyTorch on one process: losses, router losses and loads, the gradient of every parameter wherever a part
of it lies, the global norm, and the weights after the last step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from configs.run import RunConfig
from pretrain.parity_ranks import Boxes, Figures

# float32 keeps 6e-8 of a number; sums of a few thousand terms in another order differ by 1e-6 of their size, and a
# handful of such sums follow one another. A wrong factor, a missing rank or a wrong slice is larger than 1e-3.
TOLERANCE = 1e-5
KINDS = ("loss", "balance", "z", "norm", "gradients", "weights", "heldout")


@dataclass(frozen=True)
class Departure:
    """The first thing that is not as it should be."""

    what: str  # loss, balance, z, loads, gradients, norm, weights, heldout
    tensor: str  # parameter, or layer, or step
    rank: int
    error: float  # relative to the whole tensor's norm
    ratio: float  # found / expected, by least squares
    cause: str  # what such a ratio usually means; empty where it says nothing

    def __str__(self) -> str:
        where = f"{self.what} of {self.tensor} on rank {self.rank}"
        return f"{where}: relative error {self.error:.1e}, ratio {self.ratio:.4f}" + (
            f" ({self.cause})" * bool(self.cause)
        )


@dataclass
class Verdict:
    """One layout against the oracle."""

    layout: str
    ranks: int
    errors: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))  # worst of each kind
    departure: Departure | None = None
    loads_differ: bool = False  # some token went to another expert, at some step
    seconds: float = 0.0
    note: str = ""

    @property
    def agrees(self) -> bool:
        return self.departure is None

    def as_json(self) -> dict[str, Any]:
        first = _finite(vars(self.departure)) if self.departure else None
        plain = _finite(self.errors)
        return {"layout": self.layout, "ranks": self.ranks, "agrees": self.agrees, "errors": plain, "departure": first,
                "note": self.note, "seconds": round(self.seconds, 2)}  # fmt: skip


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no infinity."""
    return {k: repr(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def judge(layout: str, config: RunConfig, found: Sequence[Figures], wanted: Figures, tolerance: float) -> Verdict:
    """Compare what the ranks of a layout found with the oracle.

    Args:
        found: of every rank, in order.
    """
    verdict = Verdict(layout, len(found))
    # What is wrong early makes everything after it wrong: in order of computation the first departure says most.
    for what, tensor, rank, error, ratio in _comparisons(found, wanted):
        verdict.loads_differ |= what == "loads"  # told only where they do
        if what in verdict.errors:
            verdict.errors[what] = max(verdict.errors[what], error)
        if not error <= tolerance and verdict.departure is None:  # not <=: a NaN departs too
            cause = likely_cause(ratio, config, len(found))
            verdict.departure = Departure(what, tensor, rank, error, ratio, cause)
    return verdict


def likely_cause(ratio: float, config: RunConfig, num_ranks: int) -> str:
    """What a ratio near a degree of the layout usually means."""
    p = config.parallel
    data = p.data_degree(num_ranks)
    degrees = {
        "tensor ranks": p.tensor, "context ranks": p.context, "expert ranks": p.expert, "data ranks": data,
        "stages": p.pipeline, "micro-batches": config.train.num_micro_batches(data),
    }  # fmt: skip
    counted = (ratio, "counted once for each of the"), (1 / ratio if ratio else 0.0, "only one's share of the")
    for factor, words in counted:
        # Some parts of a tensor may be right: a factor of the whole shows to a few per cent only.
        near = [f"{n} {name}" for name, n in degrees.items() if n > 1 and abs(factor / n - 1) < 0.03]
        if near:
            return f"{words} {' or '.join(near)}?"
    return ""


Comparison = tuple[str, str, int, float, float]  # what, of which tensor, rank, error, ratio


def _comparisons(found: Sequence[Figures], wanted: Figures) -> Iterator[Comparison]:
    first = found[0]
    yield from _numbers("loss", _step(wanted.losses, 0), [_step(f.losses, 0) for f in found])
    yield from _loads(first, wanted, 0)
    yield from _numbers("balance", wanted.balance, [f.balance for f in found])
    yield from _numbers("z", wanted.z, [f.z for f in found])
    yield from tensor_errors(found, wanted)
    yield from _numbers("norm", _step(wanted.norms, 0), [_step(f.norms, 0) for f in found])
    for step in range(1, len(wanted.losses)):
        yield from _loads(first, wanted, step)
        yield from _numbers("loss", _step(wanted.losses, step), [_step(f.losses, step) for f in found])
        yield from _numbers("norm", _step(wanted.norms, step), [_step(f.norms, step) for f in found])
    yield from _tensors("weights", wanted.weights, [f.weights for f in found])
    yield from _numbers("heldout", {"after training": wanted.heldout}, [{"after training": f.heldout} for f in found])


def tensor_errors(found: Sequence[Figures], wanted: Figures) -> Iterator[Comparison]:
    """Each gradient on each rank that holds a part of it: error relative to the whole, and found / expected."""
    yield from _tensors("gradients", wanted.gradients, [f.gradients for f in found])


def _loads(found: Figures, wanted: Figures, step: int) -> Iterator[Comparison]:
    """Not a matter of rounding: where loads differ, some token went to another expert."""
    for layer, load in wanted.loads[step].items():
        there = found.loads[step].get(layer, [])
        if there != load:
            yield "loads", f"layer {layer} at step {step + 1}", 0, math.inf, sum(there) / sum(load)


def _step(values: list[float], step: int) -> dict[Any, float]:
    return {f"step {step + 1}": values[step]}


def _numbers(what: str, wanted: dict[Any, float], found: list[dict[Any, float]]) -> Iterator[Comparison]:
    for key, right in wanted.items():
        name, scale = key if isinstance(key, str) else f"layer {key}", max(abs(right), 1e-12)
        for rank, there in enumerate(found):
            value = there.get(key, math.nan)
            yield what, name, rank, abs(value - right) / scale, value / (right or scale)


def _tensors(what: str, wanted: dict[str, Boxes], found: list[dict[str, Boxes]]) -> Iterator[Comparison]:
    for name, [(_, right)] in wanted.items():
        norm = float(right.norm())
        held = torch.zeros(right.shape, dtype=torch.bool)
        for rank, boxes in enumerate(there.get(name, []) for there in found):
            if not boxes:
                continue
            error, ratio = _against(boxes, right, held)
            yield what, name, rank, error / max(norm, 1e-12), ratio
        if not held.all():
            yield what, f"{name} (a part of it lies nowhere)", 0, math.inf, float(held.float().mean())


def _against(boxes: Boxes, right: Tensor, held: Tensor) -> tuple[float, float]:
    """Norm of the difference in the boxes, and found / expected by least squares; marks what they cover in `held`."""
    difference = product = square = 0.0
    for offset, values in boxes:
        place = tuple(slice(start, start + size) for start, size in zip(offset, values.shape))
        expected = right[place]
        held[place] = True
        difference += float((values - expected).double().square().sum())
        product += float((values.double() * expected).sum())
        square += float(expected.double().square().sum())
    return math.sqrt(difference) if difference >= 0 else math.nan, product / square if square else math.nan
