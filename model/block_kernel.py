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
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.block_layout import BlockLayout

CHUNK_ROWS = 16


@dataclass(frozen=True)
class Chunk:
    """Some row blocks of one group of heads of one sequence.

    Attributes:
        row_C: int64 row blocks.
        block_CK: int64 key blocks; NONE where a row has fewer than K.
        distance_CK: int64 row block less key block; more than any for summaries and where a row has fewer.
        start_Cb: int64 position at which the document of each query starts; None where each row has K blocks and
            causality within the last of them is all that hides a key.
    """

    row_C: Tensor
    block_CK: Tensor
    distance_CK: Tensor
    start_Cb: Tensor | None

    def to(self, device: torch.device | str) -> Chunk:
        moved: dict[str, Any] = {name: v.to(device) for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True)
class Plan:
    """What the kernel does for one layout, length and set of documents. Small: passes that are to be recomputed hold it
    all the same."""

    block_size: int
    num_rows: int
    summary_T: Tensor  # int64 positions of the tokens in summary blocks
    key_Eb: Tensor  # int64 position of each key of each block, summaries behind the sequence; the last: of none
    local_R: Tensor  # int64 first position of each row's window: summaries count before it only
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
    start_BS = None if start_BS is None else start_BS.cpu()
    listed_BGRK = layout.listed(start_BS)
    start_BRb = torch.zeros(1, rows, b, dtype=torch.int64) if start_BS is None else layout.padded_starts(start_BS)
    for sequence in range(batch):
        if start_BS is None and sequence:
            chunks |= {(sequence, group): chunks[0, group] for group in range(groups)}
            continue
        listed_GRK = listed_BGRK[sequence % len(listed_BGRK)]
        for group in range(len(listed_GRK)):
            cut = _cut(listed_GRK[group], start_BRb[sequence], rows)
            chunks[sequence, group] = tuple(chunk.to(device) for chunk in cut)
        chunks |= {(sequence, group): chunks[sequence, 0] for group in range(len(listed_GRK), groups)}
    summary_T, seen_as_T = layout.summaries()
    key_Eb = torch.cat((torch.arange(rows * b), seen_as_T, torch.full((b,), rows * b))).view(-1, b)
    return Plan(b, rows, summary_T.to(device), key_Eb.to(device), (layout.local_R * b).to(device), chunks)


def _cut(listed_RK: Tensor, start_Rb: Tensor, num_rows: int) -> Iterator[Chunk]:
    """Chunks of one group of heads of one sequence, rows with most blocks first."""
    b, count_R = start_Rb.shape[1], (listed_RK >= 0).sum(1)
    plain_R = (listed_RK < num_rows).all(1) & (start_Rb[:, -1] <= listed_RK[:, 0] * b)
    for row_C in (count_R * 2 + plain_R).argsort(descending=True, stable=True).split(CHUNK_ROWS):
        block_CK = listed_RK[row_C, : int(count_R[row_C].max())]
        there = block_CK >= 0
        distance_CK = (row_C[:, None] - block_CK).where(there & (block_CK < num_rows), num_rows)
        plain = bool(plain_R[row_C].all() and there.all())
        yield Chunk(row_C, block_CK, distance_CK, None if plain else start_Rb[row_C])


def _hidden(chunk: Chunk, made: Plan) -> Tensor:
    """bool [C, b, K*b]: the complement of `BlockLayout.visible` for the gathered keys."""
    assert chunk.start_Cb is not None
    b, beyond = made.block_size, made.num_rows * made.block_size
    query_Cb = chunk.row_C[:, None] * b + torch.arange(b, device=chunk.row_C.device)
    key_CKb = made.key_Eb[chunk.block_CK]
    is_summary = (chunk.block_CK >= made.num_rows)[..., None]
    too_new = is_summary & (key_CKb >= made.local_R[chunk.row_C][:, None, None])
    key = key_CKb.masked_fill(too_new, beyond).flatten(1)[:, None]
    return (key > query_Cb[:, :, None]) | (key < chunk.start_Cb[:, :, None])


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
            p = work.probabilities(at, chunk, work.queries(at, chunk), work.gather(work.k, at, chunk))
            y[at][chunk.row_C] = torch.bmm(p, work.gather(work.v, at, chunk))
            if keep and any(ctx.needs_input_grad):
                kept.append(p)
        ctx.made = made
        ctx.save_for_backward(q_BHSN, k_BGSN, v_BGSN, tiles, *kept)
        return work.to_heads(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHSN: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, tiles, *kept = ctx.saved_tensors
        work = _Work(ctx.made, q, k, v, tiles)
        sums = _Gradients(work, tiles)
        grad = work.to_rows(grad_BHSN)
        for number, (at, chunk) in enumerate(work.chunks()):
            key, value = work.gather(work.k, at, chunk), work.gather(work.v, at, chunk)
            query = work.queries(at, chunk)
            p = kept[number] if kept else work.probabilities(at, chunk, query, key)
            sums.add(at, chunk, (query, key, value), p, grad[at].index_select(0, chunk.row_C))
        return *sums.whole(), None, None


class _Work:
    """Inputs laid out for gathering: queries [B, G, R, g*b, N], keys and values [B, G, E, b*N]."""

    def __init__(self, made: Plan, q_BHSN: Tensor, k_BGSN: Tensor, v_BGSN: Tensor, tiles: Tensor | None) -> None:
        self.plan, self.dtype, b = made, q_BHSN.dtype, made.block_size
        self.causal = torch.full((b, b), float("-inf"), dtype=self.dtype, device=q_BHSN.device).triu(1)
        self.batch, self.groups, self.length, self.width = k_BGSN.shape
        self.share = q_BHSN.shape[1] // self.groups
        self.scale = self.width**-0.5
        self.q = self.to_rows(q_BHSN)
        self.k, self.v = self.to_blocks(k_BGSN), self.to_blocks(v_BGSN)
        # [G, distances, g*b, b]
        self.tiles = None if tiles is None else self._tiles_by_group(tiles)

    def _tiles_by_group(self, tiles: Tensor) -> Tensor:
        b = self.plan.block_size
        by_group = tiles.unflatten(0, (self.groups, self.share)).to(self.dtype)
        return by_group.transpose(1, 2).reshape(self.groups, -1, self.share * b, b)

    @property
    def padding(self) -> int:
        return self.plan.num_rows * self.plan.block_size - self.length

    def to_rows(self, x_BHSN: Tensor) -> Tensor:
        """[B, H, S, N] -> [B, G, R, g*b, N]."""
        x = F.pad(x_BHSN, (0, 0, 0, self.padding)) if self.padding else x_BHSN
        x = x.reshape(self.batch, self.groups, self.share, self.plan.num_rows, -1, self.width)
        return x.transpose(2, 3).reshape(self.batch, self.groups, self.plan.num_rows, -1, self.width)

    def to_heads(self, x: Tensor) -> Tensor:
        """The reverse of `to_rows`."""
        x = x.unflatten(3, (self.share, self.plan.block_size)).transpose(2, 3)
        return x.reshape(self.batch, self.groups * self.share, -1, self.width)[:, :, : self.length]

    def to_blocks(self, x_BGSN: Tensor) -> Tensor:
        """[B, G, S, N] -> [B, G, E, b*N], with the summary blocks behind those of the sequence."""
        x = F.pad(x_BGSN, (0, 0, 0, self.padding)) if self.padding else x_BGSN
        if len(self.plan.summary_T):
            x = torch.cat((x, x[:, :, self.plan.summary_T]), dim=2)
        return x.reshape(self.batch, self.groups, -1, self.plan.block_size * self.width)

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
        found = blocks[at].index_select(0, chunk.block_CK.clamp(min=0).flatten())
        return found.view(count, width * self.plan.block_size, self.width)

    def probabilities(self, at: tuple[int, int], chunk: Chunk, query: Tensor, key: Tensor) -> Tensor:
        """[C, g*b, K*b]."""
        b, score = self.plan.block_size, torch.bmm(query, key.mT)
        by_head = score.unflatten(1, (self.share, b))
        if chunk.start_Cb is None:
            by_head[..., -b:] += self.causal
        else:
            by_head.masked_fill_(_hidden(chunk, self.plan)[:, None], float("-inf"))
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
        self.wanted_tiles = tiles
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
        blocks = chunk.block_CK.clamp(min=0).flatten()
        self._scatter(self.k_sum, blocks, torch.bmm(grad_score.mT, query))
        self._scatter(self.v_sum, blocks, torch.bmm(p.mT, grad))
        if self.tiles is not None:
            b, last = work.plan.block_size, self.tiles.shape[1] - 1
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
        if self.tiles is not None and self.wanted_tiles is not None:
            b = work.plan.block_size
            tiles = (
                self.tiles.unflatten(2, (work.share, b))
                .transpose(1, 2)
                .reshape(self.wanted_tiles.shape)
                .to(self.wanted_tiles)
            )
        return work.to_heads(self.q), self._to_keys(self.k), self._to_keys(self.v), tiles

    def _to_keys(self, x: Tensor) -> Tensor:
        """[B, G, E, b*N] -> [B, G, S, N]; what summaries received goes to their tokens."""
        work = self.work
        x = x.view(work.batch, work.groups, -1, work.width)
        ordinary = work.plan.num_rows * work.plan.block_size
        if len(work.plan.summary_T):
            x[:, :, :ordinary].index_add_(2, work.plan.summary_T, x[:, :, ordinary:])
        return x[:, :, : work.length]
