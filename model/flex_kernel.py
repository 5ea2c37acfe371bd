"""Block-sparse attention on a GPU: FlexAttention with a block mask made from the layout's lists, never from length x
length.

The blocks every row looks at (sinks) would each be one long list for the kernel's backward pass, which gives every key
block to one program. They are spread over copies, appended to the keys as summaries are; autograd adds the copies up.

B batch, H heads, G groups of heads that share keys and values, S queries, T keys with copies, b tokens a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from model.block_layout import BlockLayout
from model.position import RelativePositionBias

ROWS_A_COPY = 64  # row blocks that share one copy of a block that most rows look at
LARGEST_TILE = 128
VARIANTS = 64  # of the compiled kernel
MOST_COPIED = 4  # such blocks at most: columns, too, are seen by many, but there are many of them


@dataclass(frozen=True)
class FlexPlan:
    """What the kernel needs for one layout, length and set of documents."""

    mask: BlockMask
    extra: Tensor  # int64 positions of the keys appended to the sequence's own
    key_position_T: Tensor  # int64
    safe: bool  # see `kernel_options`


@cache
def _compiled(autotune: bool) -> Callable[..., Tensor]:
    # Tiles of FlexAttention's own choice may be larger than the layout's blocks, which it refuses; autotuning tries
    # smaller ones, for a minute once.
    # Every length, kind of layout, and use with or without gradients is a variant of its own; past the limit torch
    # would quietly compute all scores instead (`fullgraph` makes it say so).
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    options: dict[str, Any] | None = {"max_autotune": True} if autotune else None
    return torch.compile(flex_attention, dynamic=False, fullgraph=True, options=options)


def flex_attend(
    q_BHSN: Tensor, k_BGSN: Tensor, v_BGSN: Tensor, plan: FlexPlan, bias: RelativePositionBias | None
) -> Tensor:
    """softmax(q k^T / sqrt(N) + bias) v over the blocks of the plan, [B, H, S, N]."""
    length, padded, block_size = q_BHSN.shape[2], plan.mask.seq_lengths[0], plan.mask.BLOCK_SIZE[0]
    q, k, v = (F.pad(x, (0, 0, 0, padded - length)) if padded > length else x for x in (q_BHSN, k_BGSN, v_BGSN))
    if len(plan.extra):
        k, v = (torch.cat((x, x[:, :, plan.extra]), dim=2) for x in (k, v))
    y: Tensor = _compiled(block_size < LARGEST_TILE)(
        q,
        k,
        v,
        score_mod=None if bias is None else _score_mod(bias, plan.key_position_T),
        block_mask=plan.mask,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=kernel_options(q, block_size, plan.safe),
    )
    return y[:, :, :length]


def kernel_options(q: Tensor, block_size: int, safe: bool) -> dict[str, Any]:
    """Tiles, warps and stages that were fastest on an H200 (LOG.md), where they are known.

    Args:
        safe: no query meets a tile in which all is hidden from it before it has met one where something is not; else
            the kernel must look for those.
    """
    options: dict[str, Any] = {"ROWS_GUARANTEED_SAFE": safe}
    if block_size < LARGEST_TILE or q.dtype == torch.float32 or q.shape[3] > 128:
        return options
    wide = q.shape[3] > 64
    options |= {"fwd_BLOCK_M": 64 if wide else 128, "fwd_BLOCK_N": 64, "fwd_num_warps": 4, "fwd_num_stages": 3}
    tile = 32 if wide else 64
    options |= {"bwd_BLOCK_M1": tile, "bwd_BLOCK_N1": 64, "bwd_BLOCK_M2": 64, "bwd_BLOCK_N2": tile}
    return options | {"bwd_num_warps": 4, "bwd_num_stages": 3}


def _score_mod(bias: RelativePositionBias, key_position_T: Tensor) -> Callable[..., Tensor]:
    table, last = (
        bias.at(torch.arange(bias.config.max_distance + 1, device=key_position_T.device)),
        bias.config.max_distance,
    )

    def score_mod(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + table[head, (query - key_position_T[key]).clamp(0, last)]

    return score_mod


def flex_plan(layout: BlockLayout, heads: int, start_BS: Tensor | None) -> FlexPlan:
    """Block mask and appended keys.

    Args:
        layout: on the device of the queries.
    """
    b, rows, device = layout.block_size, layout.num_rows, layout.blocks_GRK.device
    blocks_BGRK = layout.listed(start_BS)
    copied = blocks_BGRK.new_empty(0)
    if start_BS is None:  # else sinks are many, a document's each; and the kernel's shapes would follow the documents
        blocks_BGRK, copied = _spread_common_blocks(layout, blocks_BGRK)
    copied_T = (copied[:, None] * b + torch.arange(b, device=device)).flatten()
    summary_T, seen_as_T = layout.summaries()
    extra = torch.cat((summary_T, copied_T))
    key_position_T = torch.cat((torch.arange(rows * b, device=device), seen_as_T, copied_T))
    num_blocks = len(key_position_T) // b
    row_R1 = torch.arange(rows, device=device)[:, None]
    there = blocks_BGRK >= 0
    is_summary = (blocks_BGRK >= rows) & (blocks_BGRK < rows + layout.num_summary_blocks)
    needs_mask = (blocks_BGRK == row_R1) | is_summary
    if start_BS is not None:
        start_BR = layout.padded_starts(start_BS)[:, :, -1]  # of each row's last query
        first_key = key_position_T[blocks_BGRK.clamp(min=0) * b]
        needs_mask = needs_mask | (first_key < start_BR[:, None, :, None])
    share = heads // blocks_BGRK.shape[1] if blocks_BGRK.shape[1] > 1 else 1
    partial = _lists(blocks_BGRK, there & needs_mask, num_blocks, share)
    full = _lists(blocks_BGRK, there & ~needs_mask, num_blocks, share)
    mask = BlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=b, mask_mod=_mask_mod(layout, key_position_T, start_BS),
        seq_lengths=(rows * b, len(key_position_T)),
    )  # fmt: skip
    return FlexPlan(mask, extra, key_position_T, safe=start_BS is None and not layout.has_summaries)


def _spread_common_blocks(layout: BlockLayout, blocks_BGRK: Tensor) -> tuple[Tensor, Tensor]:
    """Let later rows look at copies of the blocks that most rows look at; returns the lists, and the copied blocks in
    order of copies (which are numbered behind the summaries)."""
    rows, device = layout.num_rows, blocks_BGRK.device
    seen = torch.bincount(blocks_BGRK[(blocks_BGRK >= 0) & (blocks_BGRK < rows)], minlength=rows)
    # Not topk: within a recomputed block the router's top-k must be the only one (`model.block`).
    most = seen.argsort(descending=True, stable=True)[:MOST_COPIED]
    common = most[seen[most] > blocks_BGRK.shape[:3].numel() / 2]
    number_R = torch.full(
        (rows + layout.num_summary_blocks + 1,), -1, device=device
    )  # of a common block; the last: none
    number_R[common] = torch.arange(len(common), device=device)
    copy_R1 = (torch.arange(rows, device=device) // ROWS_A_COPY)[:, None]  # 0 is the original
    number = number_R[blocks_BGRK]
    first = rows + layout.num_summary_blocks
    moved = (number >= 0) & (copy_R1 > 0) & (blocks_BGRK != torch.arange(rows, device=device)[:, None])
    spread = torch.where(moved, first + (copy_R1 - 1) * len(common) + number, blocks_BGRK)
    return spread, common.repeat((rows - 1) // ROWS_A_COPY)


def _lists(blocks_BGRK: Tensor, wanted: Tensor, num_blocks: int, share: int) -> tuple[Tensor, Tensor]:
    """(how many, which) key blocks of each row, int32, wanted ones first; FlexAttention wants room for all of them."""
    order = wanted.to(torch.int8).argsort(dim=3, descending=True, stable=True)
    chosen = blocks_BGRK.clamp(min=0).expand(wanted.shape).gather(3, order)
    count = wanted.sum(3)
    chosen = chosen.where(torch.arange(chosen.shape[3], device=chosen.device) < count[..., None], 0)
    chosen = F.pad(chosen, (0, num_blocks - chosen.shape[3]))
    return count.repeat_interleave(share, 1).int(), chosen.repeat_interleave(share, 1).int().contiguous()


def _mask_mod(layout: BlockLayout, key_position_T: Tensor, start_BS: Tensor | None) -> Any:
    """What hides a key inside a block: causality, the window before which summaries count, and documents."""
    b, rows = layout.block_size, layout.num_rows
    ordinary, summaries_end = rows * b, rows * b + layout.num_summary_blocks * b
    local_R, has_summaries = layout.local_R, layout.has_summaries
    start = None if start_BS is None else layout.padded_starts(start_BS).flatten(1)

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        position = key_position_T[key]
        visible = position <= query
        if has_summaries:
            is_summary = (key >= ordinary) & (key < summaries_end)
            visible = visible & (~is_summary | (position < local_R[query // b] * b))
        if start is not None:
            visible = visible & (position >= start[batch, query])
        return visible

    return mask_mod
