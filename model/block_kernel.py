"""Block-sparse attention as dense tensor work: each row block's keys and values are gathered, then three products.

No masks of length x length, no loop over rows: chunks of `CHUNK_ROWS` row blocks at a time, so that what is gathered
stays in cache. Linear in the blocks looked at. The backward pass either recomputes the probabilities ("chunked": keeps
nothing but its inputs) or kept them ("gathered").

B batch, H heads, G groups of heads that share keys and values, g = H / G, S queries, N head width, b tokens a block, R
row blocks, E key blocks (of the sequence, then of summaries), C rows of a chunk, K blocks a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from model.block_layout import BlockLayout

CHUNK_ROWS = 16


@dataclass(frozen=True)
class Chunk:
    """Some row blocks of one group of heads of one sequence.

    Attributes:
        row_C: int64 row blocks.
        block_CK: int64 key blocks; 0 where a row has fewer than K.
        distance_CK: int64 row block less key block; more than any for summaries and where a row has fewer.
        plain: each row has K blocks, and causality within the last of them is all that hides a key.
        positions: what else decides, see `_visible`; None where plain.
    """

    row_C: Tensor
    block_CK: Tensor
    distance_CK: Tensor
    plain: bool
    query_from_Cb: Tensor | None = None  # int64 first position each query may see
    key_CT: Tensor | None = None  # int64 position of each gathered key; beyond the last where a row has fewer
    key_before_CT: Tensor | None = None  # int64 summaries count before this position only

    def to(self, device: torch.device | str) -> Chunk:
        moved: dict[str, Any] = {name: v.to(device) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class Plan:
    """What the kernel does for one layout, length and set of documents."""

    layout: BlockLayout
    summary: Tensor  # int64 positions of summary tokens, padded to whole blocks
    chunks: dict[tuple[int, int], tuple[Chunk, ...]]  # (sequence, group of heads) -> all of its rows


def plan(
    layout: BlockLayout, batch: int, groups: int, start_BS: Tensor | None, device: torch.device | str = "cpu"
) -> Plan:
    """Cut the rows into chunks of (nearly) equal numbers of blocks.

    Args:
        layout: on the CPU, where the plan is made.
        start_BS: int64 position at which the document of each token starts; None where that is 0 for all.
        device: of the tensors the plan is for.
    """
    b, rows = layout.block_size, layout.num_rows
    chunks: dict[tuple[int, int], tuple[Chunk, ...]] = {}
    listed_BGRK = layout.listed(None if start_BS is None else start_BS.cpu())
    for sequence in range(batch):
        if start_BS is None and sequence:
            chunks |= {(sequence, group): chunks[0, group] for group in range(groups)}
            continue
        listed_GRK, start_S = listed_BGRK[sequence % len(listed_BGRK)], torch.zeros(rows * b, dtype=torch.int64)
        if start_BS is not None:
            start_S = F.pad(start_BS[sequence].cpu(), (0, len(start_S) - start_BS.shape[1]), value=start_BS.shape[1])
        for group in range(len(listed_GRK)):
            cut = _cut(layout, listed_GRK[group], start_S.view(rows, b))
            chunks[sequence, group] = tuple(chunk.to(device) for chunk in cut)
        chunks |= {(sequence, group): chunks[sequence, 0] for group in range(len(listed_GRK), groups)}
    padding = layout.num_summary_blocks * b - len(layout.summary_T)
    return Plan(layout, F.pad(layout.summary_T, (0, padding)).to(device), chunks)  # what fills up is masked


def _cut(layout: BlockLayout, listed_RK: Tensor, start_Rb: Tensor) -> Iterator[Chunk]:
    """Chunks of one group of heads of one sequence, rows with most blocks first."""
    b, rows = layout.block_size, layout.num_rows
    key_Eb = torch.cat(
        (torch.arange(rows * b), F.pad(layout.summary_T, (0, -len(layout.summary_T) % b), value=rows * b))
    )
    key_Eb = torch.cat((key_Eb, torch.full((b,), rows * b))).view(-1, b)  # the last stands for "none"
    count_R = (listed_RK >= 0).sum(1)
    plain_R = (listed_RK < rows).all(1) & (start_Rb[:, -1] <= listed_RK[:, 0] * b)
    for row_C in (count_R * 2 + plain_R).argsort(descending=True, stable=True).split(CHUNK_ROWS):
        block_CK = listed_RK[row_C, : int(count_R[row_C].max())]
        there = block_CK >= 0
        is_block = there & (block_CK < rows)
        distance = (row_C[:, None] - block_CK).where(is_block, rows)
        if plain_R[row_C].all() and there.all():
            yield Chunk(row_C, block_CK, distance, True)
            continue
        local = (layout.local_R[row_C] * b)[:, None].where(block_CK >= rows, rows * b)
        yield Chunk(
            row_C, block_CK.clamp(min=0), distance, False, start_Rb[row_C], key_Eb[block_CK].flatten(1),
            local.repeat_interleave(b, 1),
        )  # fmt: skip


def _hidden(chunk: Chunk, block_size: int) -> Tensor:
    """bool [C, b, K*b]: the complement of `BlockLayout.visible` for the gathered keys."""
    assert chunk.query_from_Cb is not None and chunk.key_CT is not None and chunk.key_before_CT is not None
    query = chunk.row_C[:, None] * block_size + torch.arange(block_size, device=chunk.row_C.device)
    key = chunk.key_CT.where(chunk.key_CT < chunk.key_before_CT, torch.iinfo(torch.int64).max)[:, None]
    return (key > query[:, :, None]) | (key < chunk.query_from_Cb[:, :, None])


def attend(q_BHSN: Tensor, k_BGSN: Tensor, v_BGSN: Tensor, tiles: Tensor | None, made: Plan, keep: bool) -> Tensor:
    """softmax(q k^T / sqrt(N) + bias) v over the blocks of the plan, [B, H, S, N].

    Args:
        tiles: [H, distances, b, b] additive bias of a row block and a key block so many blocks before it (the last
            holds for all farther ones), or None.
        keep: keep the probabilities for the backward pass (S x K x b values a head) instead of recomputing them.
    """
    y: Tensor = _BlockAttention.apply(q_BHSN, k_BGSN, v_BGSN, tiles, made, keep)
    return y


class _BlockAttention(Function):
    @staticmethod
    def forward(
        ctx: Any, q_BHSN: Tensor, k_BGSN: Tensor, v_BGSN: Tensor, tiles: Tensor | None, made: Plan, keep: bool
    ) -> Tensor:
        work = _Work(made, q_BHSN, k_BGSN, v_BGSN, tiles)
        y, kept = torch.empty_like(work.q), []
        for at, chunk in work.chunks():
            p, value = work.probabilities(at, chunk), work.gather(work.v, at, chunk)
            y[at][chunk.row_C] = torch.bmm(p, value)
            if keep and any(ctx.needs_input_grad):
                kept.append(p)
        ctx.made = made
        ctx.save_for_backward(q_BHSN, k_BGSN, v_BGSN, tiles, *kept)
        return work.to_heads(y)

    @staticmethod
    def backward(ctx: Any, grad_BHSN: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, tiles, *kept = ctx.saved_tensors
        work = _Work(ctx.made, q, k, v, tiles)
        sums = _Gradients(work, tiles)
        grad = work.to_rows(grad_BHSN)
        for number, (at, chunk) in enumerate(work.chunks()):
            key, value = work.gather(work.k, at, chunk), work.gather(work.v, at, chunk)
            query = work.queries(at, chunk)
            p = kept[number] if kept else work.probabilities(at, chunk, key, query)
            sums.add(at, chunk, (query, key, value), p, grad[at].index_select(0, chunk.row_C))
        return *sums.whole(), None, None


class _Work:
    """Inputs laid out for gathering: queries [B, G, R, g*b, N], keys and values [B, G, E, b*N]."""

    def __init__(self, made: Plan, q_BHSN: Tensor, k_BGSN: Tensor, v_BGSN: Tensor, tiles: Tensor | None) -> None:
        self.layout, self.dtype, self.plan = made.layout, q_BHSN.dtype, made
        b = made.layout.block_size
        self.causal = torch.full((b, b), float("-inf"), dtype=self.dtype, device=q_BHSN.device).triu(1)
        self.batch, self.groups, self.length, self.width = k_BGSN.shape
        self.share = q_BHSN.shape[1] // self.groups
        self.scale = self.width**-0.5
        self.q = self.to_rows(q_BHSN)
        self.k, self.v = self.to_blocks(k_BGSN), self.to_blocks(v_BGSN)
        # [G, distances, g*b, b]
        self.tiles = None if tiles is None else self._tiles_by_group(tiles)

    def _tiles_by_group(self, tiles: Tensor) -> Tensor:
        b = self.layout.block_size
        by_group = tiles.unflatten(0, (self.groups, self.share)).to(self.dtype)
        return by_group.transpose(1, 2).reshape(self.groups, -1, self.share * b, b)

    @property
    def padding(self) -> int:
        return self.layout.num_rows * self.layout.block_size - self.length

    def to_rows(self, x_BHSN: Tensor) -> Tensor:
        """[B, H, S, N] -> [B, G, R, g*b, N]."""
        x = F.pad(x_BHSN, (0, 0, 0, self.padding)) if self.padding else x_BHSN
        x = x.reshape(self.batch, self.groups, self.share, self.layout.num_rows, -1, self.width)
        return x.transpose(2, 3).reshape(self.batch, self.groups, self.layout.num_rows, -1, self.width)

    def to_heads(self, x: Tensor) -> Tensor:
        """The reverse of `to_rows`."""
        x = x.unflatten(3, (self.share, self.layout.block_size)).transpose(2, 3)
        return x.reshape(self.batch, self.groups * self.share, -1, self.width)[:, :, : self.length]

    def to_blocks(self, x_BGSN: Tensor) -> Tensor:
        """[B, G, S, N] -> [B, G, E, b*N], with the summary blocks behind those of the sequence."""
        x = F.pad(x_BGSN, (0, 0, 0, self.padding)) if self.padding else x_BGSN
        if self.layout.has_summaries:
            x = torch.cat((x, x[:, :, self.plan.summary]), dim=2)
        return x.reshape(self.batch, self.groups, -1, self.layout.block_size * self.width)

    def chunks(self) -> Iterator[tuple[tuple[int, int], Chunk]]:
        """((sequence, group), chunk), all chunks of a group one after the other."""
        for at in ((sequence, group) for sequence in range(self.batch) for group in range(self.groups)):
            for chunk in self.plan.chunks[at]:
                yield at, chunk

    def queries(self, at: tuple[int, int], chunk: Chunk) -> Tensor:
        """[C, g*b, N], scaled."""
        return self.q[at].index_select(0, chunk.row_C).mul_(self.scale)

    def gather(self, blocks: Tensor, at: tuple[int, int], chunk: Chunk) -> Tensor:
        """[C, K*b, N]."""
        count, width = chunk.block_CK.shape
        found = blocks[at].index_select(0, chunk.block_CK.flatten())
        return found.view(count, width * self.layout.block_size, self.width)

    def probabilities(
        self, at: tuple[int, int], chunk: Chunk, key: Tensor | None = None, query: Tensor | None = None
    ) -> Tensor:
        """[C, g*b, K*b]."""
        key = self.gather(self.k, at, chunk) if key is None else key
        b = self.layout.block_size
        score = torch.bmm(self.queries(at, chunk) if query is None else query, key.mT)
        by_head = score.unflatten(1, (self.share, b))
        if chunk.plain:
            by_head[..., -b:] += self.causal
        else:
            by_head.masked_fill_(_hidden(chunk, b)[:, None], float("-inf"))
        if self.tiles is not None:
            tile = self.tiles[at[1]][chunk.distance_CK.clamp(max=self.tiles.shape[1] - 1)]
            score.unflatten(2, (-1, b)).add_(tile.transpose(1, 2))
        return torch.softmax(score, dim=-1)


class _Gradients:
    """Sums of gradients; those of keys and values in float32 at least, one group of heads at a time."""

    def __init__(self, work: _Work, tiles: Tensor | None) -> None:
        self.work = work
        self.q, self.k, self.v = torch.empty_like(work.q), torch.empty_like(work.k), torch.empty_like(work.v)
        wide = torch.float64 if work.dtype == torch.float64 else torch.float32
        self.k_sum, self.v_sum = (torch.empty(work.k.shape[2:], dtype=wide, device=work.k.device) for _ in range(2))
        self.buffer = self.k_sum.new_empty(0)
        self.tiles_shape = None if tiles is None else tiles.shape
        self.tiles = None if work.tiles is None else torch.zeros_like(work.tiles, dtype=wide)
        self.at: tuple[int, int] | None = None

    def add(
        self, at: tuple[int, int], chunk: Chunk, inputs: tuple[Tensor, Tensor, Tensor], p: Tensor, grad: Tensor
    ) -> None:
        if at != self.at:
            self._store()
            self.at = at
            self.k_sum.zero_(), self.v_sum.zero_()
        work, (query, key, value) = self.work, inputs
        grad_p = torch.bmm(grad, value.mT)
        grad_score = torch._softmax_backward_data(grad_p, p, -1, work.dtype)
        self.q[at][chunk.row_C] = torch.bmm(grad_score, key).mul_(work.scale)
        blocks = chunk.block_CK.flatten()
        self._scatter(self.k_sum, blocks, torch.bmm(grad_score.mT, query))
        self._scatter(self.v_sum, blocks, torch.bmm(p.mT, grad))
        if self.tiles is not None:
            b, last = work.layout.block_size, self.tiles.shape[1] - 1
            by_block = grad_score.unflatten(2, (-1, b)).transpose(1, 2).flatten(0, 1)
            self.tiles[at[1]].index_add_(0, chunk.distance_CK.clamp(max=last).flatten(), by_block.to(self.tiles.dtype))

    def _scatter(self, sums: Tensor, blocks: Tensor, part: Tensor) -> None:
        rows = part.view(len(blocks), -1)
        if rows.dtype != sums.dtype:
            if self.buffer.shape[0] < len(blocks):
                self.buffer = sums.new_empty(rows.shape)
            rows = self.buffer[: len(blocks)].copy_(rows)
        sums.index_add_(0, blocks, rows)

    def _store(self) -> None:
        if self.at is not None:
            self.k[self.at], self.v[self.at] = self.k_sum, self.v_sum

    def whole(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        self._store()
        work = self.work
        tiles = None
        if self.tiles is not None and self.tiles_shape is not None:
            b = work.layout.block_size
            tiles = self.tiles.unflatten(2, (work.share, b)).transpose(1, 2).reshape(self.tiles_shape).to(work.dtype)
        return work.to_heads(self.q), self._to_keys(self.k), self._to_keys(self.v), tiles

    def _to_keys(self, x: Tensor) -> Tensor:
        """[B, G, E, b*N] -> [B, G, S, N]; what summaries received goes to their tokens."""
        work = self.work
        x = x.view(work.batch, work.groups, -1, work.width)
        ordinary = work.layout.num_rows * work.layout.block_size
        if work.layout.has_summaries:
            x[:, :, :ordinary].index_add_(2, work.plan.summary, x[:, :, ordinary:])
        return x[:, :, : work.length]
