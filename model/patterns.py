"""The block layouts: pattern(config, layer, heads, length) -> BlockLayout. No row depends on the length.

Sources: BigBird (arXiv:2007.14062, sec. 2), ETC (arXiv:2004.08483, sec. 3), the fixed pattern of Sparse Transformers
(arXiv:1904.10509, sec. 4.3), each made causal: global rows vanish, random blocks come from the past.

G groups of heads that share keys and values, R row blocks, b tokens a block. Lists hold NONE where a row has fewer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from configs.attention import BigBirdLayout, EtcLayout, SparseConfig, StridedLayout, WindowLayout
from model.block_layout import NONE, BlockLayout


@dataclass(frozen=True)
class _Rows:
    """What a pattern is asked for."""

    row_R: Tensor  # int64, 0 ... R - 1
    block_size: int
    layer: int
    group_G: Tensor  # int64 numbers of the heads' groups in the whole model


@dataclass(frozen=True)
class _Seen:
    """What a pattern answers: lists of blocks [G or 1, R, any], none twice, and the row's first window block."""

    lists: tuple[Tensor, ...]
    local_R: Tensor
    summary_T: Tensor | None = None


def block_layout(spec: SparseConfig, layer: int, groups: range, length: int) -> BlockLayout:
    """The layout of a layer.

    Args:
        groups: numbers, in the whole model, of the groups of heads that are here (one a key-value head).
        length: tokens; rounded up to whole blocks.
    """
    rows = torch.arange(-(-length // spec.block_size))
    asked = _Rows(rows, spec.block_size, layer, torch.arange(groups.start, groups.stop))
    seen = PATTERNS[spec.layout.kind](spec.layout, asked)
    num_groups = max(part.shape[0] for part in seen.lists)
    blocks = torch.cat([part.expand(num_groups, -1, -1) for part in seen.lists], dim=2)
    last = torch.iinfo(torch.int64).max
    blocks = blocks.masked_fill(blocks < 0, last).sort(dim=2).values
    blocks = blocks[..., : int((blocks != last).sum(2).max())]
    summary = rows.new_empty(0) if seen.summary_T is None else seen.summary_T
    return BlockLayout(spec.block_size, blocks.masked_fill(blocks == last, NONE), seen.local_R, summary)


def _window(spec: WindowLayout, rows: _Rows) -> _Seen:
    newest = rows.row_R[:, None] - torch.arange(spec.window)
    return _Seen((newest.clamp(min=NONE)[None],), _local(rows, spec.window))


def _bigbird(spec: BigBirdLayout, rows: _Rows) -> _Seen:
    window = _window(WindowLayout(window=spec.window), rows)
    drawn = _past_random(spec, rows, window.local_R)
    return _Seen((_sinks(spec.sinks, window.local_R), drawn, *window.lists), window.local_R)


def _etc(spec: EtcLayout, rows: _Rows) -> _Seen:
    b, row, segment = rows.block_size, rows.row_R, spec.segment_tokens // rows.block_size
    own_segment = row // segment * segment
    ends_segment = row % segment == segment - 1
    # The row that ends a segment looks at all of it; its window, where that is longer, stays.
    local = torch.minimum(_local(rows, spec.window), own_segment.where(ends_segment, row))
    near = row[:, None] - torch.arange(max(segment, spec.window))
    near = near.where(near >= local[:, None], NONE)
    tokens = torch.arange(len(row) * b)
    summary = tokens[tokens % spec.segment_tokens >= spec.segment_tokens - spec.summary_tokens]
    summary = summary[summary >= spec.sinks * b]  # sinks are seen anyway
    # Blocks of summaries of which at least one lies before the window.
    block = torch.arange(-(-len(summary) // b))
    oldest = summary[block * b]
    seen = (len(row) + block).expand(len(row), -1).where(oldest[None] < local[:, None] * b, NONE)
    return _Seen((_sinks(spec.sinks, local), near[None], seen[None]), local, summary)


def _strided(spec: StridedLayout, rows: _Rows) -> _Seen:
    window = _window(WindowLayout(window=spec.window), rows)
    column = rows.row_R[rows.row_R % spec.stride == spec.stride - 1]
    columns = column.expand(len(rows.row_R), -1).where(column[None] < window.local_R[:, None], NONE)
    return _Seen((columns[None], *window.lists), window.local_R)


def _full(_: Any, rows: _Rows) -> _Seen:
    blocks = rows.row_R.expand(len(rows.row_R), -1)
    return _Seen((blocks.where(blocks <= rows.row_R[:, None], NONE)[None],), torch.zeros_like(rows.row_R))


# A pattern is one class in configs/attention.py and one function here.
PATTERNS: dict[str, Callable[[Any, _Rows], _Seen]] = {
    "window": _window,
    "bigbird": _bigbird,
    "etc": _etc,
    "strided": _strided,
    "full": _full,
}


# ---- parts -----------------------------------------------------------------------------------------------------------
def _local(rows: _Rows, window: int) -> Tensor:
    return (rows.row_R - window + 1).clamp(min=0)


def _sinks(sinks: int, local_R: Tensor) -> Tensor:
    """The first blocks, as far as the window does not hold them: [1, R, sinks]."""
    block = torch.arange(sinks).expand(len(local_R), -1)
    return block.where(block < local_R[:, None], NONE)[None]


def _past_random(spec: BigBirdLayout, rows: _Rows, local_R: Tensor) -> Tensor:
    """Distinct blocks between sinks and window, [G, R, random]; all of them where there are fewer.

    Floyd's sampling (Bentley & Floyd, CACM 1987), all rows at once, from a hash of (seed, layer, group, row, draw).
    """
    count_R = (local_R - spec.sinks).clamp(min=0)
    drawn: list[Tensor] = []
    for draw in range(spec.random):
        # One of the first `top + 1`; where that is taken, `top` itself. (Below 0 all are taken anyway, see below.)
        top = count_R - spec.random + draw
        chosen = _hash(spec.seed, rows, draw) % (top.clamp(min=0) + 1)
        taken = torch.stack([chosen == before for before in drawn]).any(0) if drawn else torch.zeros_like(chosen).bool()
        drawn.append(torch.where(taken, top, chosen))
    if not drawn:
        return local_R.new_empty(1, len(local_R), 0)
    found = torch.stack(drawn, dim=2)
    few = torch.arange(spec.random).expand(len(count_R), -1)
    few = few.where(few < count_R[:, None], NONE)  # fewer than asked for: all
    found = torch.where((count_R < spec.random)[None, :, None], few[None], found)
    return torch.where(found >= 0, found + spec.sinks, NONE)


def _hash(seed: int, rows: _Rows, draw: int) -> Tensor:
    """Non-negative int64 [G, R], well mixed (splitmix64; Steele et al., OOPSLA 2014)."""
    mixed = _mix(torch.full((len(rows.group_G), len(rows.row_R)), seed, dtype=torch.int64))
    for value in (torch.tensor(rows.layer), rows.group_G[:, None], rows.row_R[None, :], torch.tensor(draw)):
        mixed = _mix(mixed + value)
    return mixed & (2**63 - 1)


def _mix(x: Tensor) -> Tensor:
    """One step of splitmix64 in int64, which wraps around."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, by: int) -> Tensor:
    """Logical shift to the right."""
    return (x >> by) & ((1 << (64 - by)) - 1)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
