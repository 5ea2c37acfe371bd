"""Checkpoints looked into: what one holds, and what differs between two. Nothing is written."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from configs.base import differences
from data_prep.progress import Reporter
from parallel.checkpoint_manifest import Manifest, StoredTensor
from parallel.checkpoint_serial import WholeReader, runs_of
from pretrain.checkpoint_tools import WEIGHT, one_thread

KINDS = ("weight", "exp_avg", "exp_avg_sq")  # behind the last slash of a name
_BLOCK = 2**18  # values compared at a time: they stay in a core's cache
# (name of a parameter, part it belongs to, as `pretrain/budget.py` counts parts); the first row that fits counts.
_PARTS = (
    ("*norm.scale", "norms"),
    ("*.attention.bias.table", "position"),
    ("*.attention.*", "attention"),
    ("*.ffn.*", "dense_ffn"),
    ("*.router.*", "router"),
    ("*.experts.*", "experts"),
    ("embed.weight", "embedding"),
    ("head.weight", "embedding"),
    ("*", "other"),
)
_AS_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


# ---- one ------------------------------------------------------------------------------------------------------------
@dataclass
class Total:
    tensors: int = 0
    values: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class Summary:
    """What a checkpoint holds, by kind of tensor, and its parameters by part of the model."""

    files: int
    bytes: int  # of these files, without the manifest
    kinds: dict[str, Total]
    parts: dict[str, int]


def summarise(manifest: Manifest) -> Summary:
    kinds: dict[str, Total] = {}
    parts: dict[str, int] = {}
    for name, tensor in manifest.tensors.items():
        kind, values = kind_of(name), math.prod(tensor.shape)
        total = kinds.setdefault(kind, Total())
        total.tensors += 1
        total.values += values
        total.bytes += tensor.num_bytes
        if kind == "weight":
            part = part_of(name.removesuffix(WEIGHT))
            parts[part] = parts.get(part, 0) + values
    return Summary(len(manifest.files), sum(file.bytes for file in manifest.files), kinds, parts)


def kind_of(name: str) -> str:
    if name.startswith("random_state/"):
        return "random state"
    kind = name.rpartition("/")[2]
    return kind if "/" in name and kind in KINDS else "other"


def part_of(parameter: str) -> str:
    return next(part for pattern, part in _PARTS if fnmatchcase(parameter, pattern))


def matching(manifest: Manifest, pattern: str) -> dict[str, StoredTensor]:
    """Tensors whose name matches, in order of name."""
    return {name: tensor for name, tensor in sorted(manifest.tensors.items()) if fnmatchcase(name, pattern)}


def describe(manifest: Manifest, tensor: StoredTensor) -> dict[str, Any]:
    files = sorted({manifest.files[box.file].name for box in tensor.boxes})
    facts = {"shape": list(tensor.shape), "dtype": tensor.dtype, "boxes": len(tensor.boxes)}
    return {**facts, "bytes": tensor.num_bytes, "files": files}


# ---- two ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Compared:
    """One tensor of two checkpoints, of one shape.

    Attributes:
        differing: values whose bits differ (of other types: whose values do).
        max_abs: largest |a - b| where both are finite.
        relative: |a - b| / max(|a|, |b|) as vectors (L2), over finite values.
        nonfinite: of those that differ, values that are not finite in one or both; no tolerance covers them.
    """

    name: str
    dtypes: tuple[str, str]
    values: int
    differing: int
    max_abs: float
    relative: float
    nonfinite: int

    @property
    def bit_equal(self) -> bool:
        return self.dtypes[0] == self.dtypes[1] and not self.differing

    def passes(self, tolerance: float | None) -> bool:
        """Whether it counts as equal: bit by bit, or within a tolerance, whatever the types."""
        if tolerance is None:
            return self.bit_equal
        return not self.nonfinite and self.max_abs <= tolerance


@dataclass(frozen=True)
class Comparison:
    """What differs between checkpoints a and b.

    Attributes:
        documents: section (config, state, layout, tokenizers) -> (dotted key, in a, in b).
        shapes: tensors of other shapes -> in a, in b.
        compared: tensors that both hold in one shape.
    """

    documents: dict[str, list[tuple[str, Any, Any]]]
    only_a: list[str]
    only_b: list[str]
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]]
    compared: list[Compared]

    def differing(self, tolerance: float | None) -> list[Compared]:
        """Those that do not pass for equal, the worst first."""
        found = [one for one in self.compared if not one.passes(tolerance)]
        return sorted(found, key=lambda one: (-one.nonfinite, -one.max_abs, one.name))

    def equal(self, tolerance: float | None) -> bool:
        """Whether both hold the same tensors."""
        return not (self.only_a or self.only_b or self.shapes or self.differing(tolerance))


def compare(a: WholeReader, b: WholeReader, pattern: str, reporter: Reporter) -> Comparison:
    """Hold two checkpoints against each other, of tensors those whose name matches; all of their values are read."""
    documents = {}
    for section in ("config", "state", "layout", "tokenizers"):
        found = differences(a.manifest.document.get(section), b.manifest.document.get(section))
        documents[section] = [(key or section, here, there) for key, here, there in found]
    in_a, in_b = matching(a.manifest, pattern), matching(b.manifest, pattern)
    both = [name for name in in_a if name in in_b]
    shapes = {n: (in_a[n].shape, in_b[n].shape) for n in both if in_a[n].shape != in_b[n].shape}
    alike = [name for name in both if name not in shapes]
    compared = []
    total = sum(in_a[name].num_bytes for name in alike)
    with one_thread(), reporter.stage("compare", total) as advance:
        for name in alike:
            compared.append(_compare_tensor(a, b, name))
            advance(in_a[name].num_bytes)
    only_a, only_b = ([n for n in here if n not in there] for here, there in ((in_a, in_b), (in_b, in_a)))
    return Comparison(documents, only_a, only_b, shapes, compared)


def _compare_tensor(a: WholeReader, b: WholeReader, name: str) -> Compared:
    stored, dtypes = a.manifest.tensors[name], (a.manifest.tensors[name].dtype, b.manifest.tensors[name].dtype)
    sums = _Sums()
    for first, count in runs_of(stored.shape, stored.dtype):
        rows_a, rows_b = a.rows(name, first, count).reshape(-1), b.rows(name, first, count).reshape(-1)
        for block_a, block_b in zip(rows_a.split(_BLOCK), rows_b.split(_BLOCK), strict=True):
            sums.add(block_a, block_b)
    return Compared(name, dtypes, math.prod(stored.shape), sums.differing, sums.max_abs, sums.relative, sums.nonfinite)


class _Sums:
    """Gathers over a tensor, block by block, in float64."""

    def __init__(self) -> None:
        self.differing, self.nonfinite, self.max_abs = 0, 0, 0.0
        self._squares_a, self._squares_b, self._squares_between = 0.0, 0.0, 0.0

    @property
    def relative(self) -> float:
        if not self._squares_between:
            return 0.0
        return math.sqrt(self._squares_between / max(self._squares_a, self._squares_b))

    def add(self, a_N: Tensor, b_N: Tensor) -> None:
        """N values of each, flat."""
        bits = _AS_BITS[a_N.element_size()]
        if a_N.dtype == b_N.dtype and torch.equal(a_N.view(bits), b_N.view(bits)):
            squares = _squares(a_N)
            self._squares_a += squares
            self._squares_b += squares
            return
        between_N = a_N.double() - b_N.double()
        unlike_N = a_N.view(bits) != b_N.view(bits) if a_N.dtype == b_N.dtype else between_N != 0
        largest = float(between_N.abs().max())
        if not math.isfinite(largest):
            finite_N = a_N.isfinite() & b_N.isfinite()
            unlike_N &= ~(a_N.isinf() & (a_N == b_N))  # of other types; of one type their bits have been compared
            self.nonfinite += int((unlike_N & ~finite_N).count_nonzero())
            between_N = between_N[finite_N]
            largest = float(between_N.abs().max()) if between_N.numel() else 0.0
        self.differing += int(unlike_N.count_nonzero())
        self.max_abs = max(self.max_abs, largest)
        self._squares_a += _squares(a_N)
        self._squares_b += _squares(b_N)
        self._squares_between += float(between_N.square_().sum())


def _squares(values_N: Tensor) -> float:
    """Sum of the squares of those values that are finite."""
    values_N = values_N if values_N.is_floating_point() else values_N.double()
    norm = float(torch.linalg.vector_norm(values_N, dtype=torch.float64))
    if not math.isfinite(norm):
        norm = float(torch.linalg.vector_norm(values_N[values_N.isfinite()], dtype=torch.float64))
    return norm * norm


def to_json(found: Comparison, tolerance: float | None) -> dict[str, Any]:
    """With one entry for each tensor that is not bit-equal."""
    unlike = [one for one in found.compared if not one.bit_equal]
    return {
        "equal": found.equal(tolerance),
        "tolerance": tolerance,
        "documents": {
            section: {key: {"a": here, "b": there} for key, here, there in rows}
            for section, rows in found.documents.items()
        },
        "only_a": found.only_a,
        "only_b": found.only_b,
        "shapes": {name: {"a": list(here), "b": list(there)} for name, (here, there) in found.shapes.items()},
        "bit_equal": len(found.compared) - len(unlike),
        "unlike": [{**asdict(one), "passes": one.passes(tolerance)} for one in unlike],
    }
