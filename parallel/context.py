"""Context parallelism: sequences too long for one rank (DeepSpeed-Ulysses, arXiv:2309.14509, sec. 3).

Between layers each of R ranks holds one part of every sequence. Attention wants whole sequences, but no more than one
head at a time: an all-to-all hands each rank all positions of its part of the heads, and another brings the answers
home. Positions, patterns and documents come in between, and so are those of whole sequences whatever is here.

B batch, S sequence, s = S / R, H heads, h = H / R, G groups of heads that share keys and values, g those of a rank,
N head width, D width, E experts, K choices a token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from model.router import SequenceShare
from parallel.part import Part
from parallel.tensor import SplitSequences, own_range
from parallel.topology import Topology


class _Swap(Function):
    """[R, ...], a part for each rank -> [R, ...], the part from each. Its own reverse, in the backward pass too."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts, arrived = parts.contiguous(), torch.empty_like(parts, memory_format=torch.contiguous_format)
        dist.all_to_all_single(arrived, parts, group=group)
        return arrived

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return _Swap.apply(grad, ctx.group), None


class SplitHeads:
    """Heads change places with positions (`model.attention.HeadExchange`)."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group, self.ranks = group, group.size()

    def enter(self, q_BHsN: Tensor, k_BGsN: Tensor, v_BGsN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, H, s, N] -> [B, h, S, N]; queries, keys and values travel together. Where a rank has part of the heads
        of one group only, each of those ranks gets a copy of the group's keys and values."""
        copies = max(1, self.ranks // k_BGsN.shape[1])
        if copies > 1:
            k_BGsN, v_BGsN = k_BGsN.repeat_interleave(copies, 1), v_BGsN.repeat_interleave(copies, 1)
        parts = [x.unflatten(1, (self.ranks, -1)).transpose(0, 1) for x in (q_BHsN, k_BGsN, v_BGsN)]
        arrived_RBhsN = _Swap.apply(torch.cat(parts, 2), self.group)
        q, k, v = arrived_RBhsN.split([part.shape[2] for part in parts], 2)
        return tuple(x.permute(1, 2, 0, 3, 4).flatten(2, 3) for x in (q, k, v))  # type: ignore[return-value]

    def leave(self, y_BhSN: Tensor) -> Tensor:
        """[B, h, S, N] -> [B, H, s, N], with heads side by side in memory, as the output product wants them."""
        parts_RBhsN = y_BhSN.unflatten(2, (self.ranks, -1)).permute(2, 0, 1, 3, 4)
        arrived_RBhsN = _Swap.apply(parts_RBhsN, self.group)
        return arrived_RBhsN.permute(1, 3, 0, 2, 4).flatten(2, 3).transpose(1, 2)  # type: ignore[no-any-return]


class Nested:
    """The router's view (`model.router.SequenceShare`) where a part of each sequence is itself shared or split."""

    def __init__(self, inner: SequenceShare, outer: SequenceShare) -> None:
        self.inner, self.outer = inner, outer

    def whole(self, logits_BsE: Tensor) -> Tensor:
        return self.outer.whole(self.inner.whole(logits_BsE))

    def own(self, decided: Tensor, num_sequences: int) -> Tensor:
        return self.inner.own(self.outer.own(decided, num_sequences), num_sequences)


def split_sequences(part: Part, group: dist.ProcessGroup) -> None:
    """Let a rank's blocks work on its part of every sequence. Called after `split_tensors`, which may cut that again.

    Args:
        group: the ranks with the other parts, in order of position.
    """
    for block in part.local_blocks().values():
        attention = block.attention
        attention.exchange = SplitHeads(group)
        if attention.blocks is not None:
            attention.blocks.groups = _own_groups(attention.blocks.groups, group.rank(), group.size())
        if attention.bias is not None:
            heads = own_range(range(attention.bias.table.shape[0]), group.rank(), group.size())
            attention.bias.heads = slice(heads.start, heads.stop)
        if block.moe is not None:
            block.moe.router.share = Nested(block.moe.router.share, SplitSequences(group))


def _own_groups(groups: range, rank: int, ranks: int) -> range:
    """Numbers of the groups of heads whose keys and values a rank gets."""
    if len(groups) >= ranks:
        return own_range(groups, rank, ranks)
    number = rank * len(groups) // ranks
    return groups[number : number + 1]


def own_part(x_BS: Tensor, topology: Topology) -> Tensor:
    """What a rank holds of whole sequences."""
    return x_BS.unflatten(1, (topology.context, -1))[:, topology.context_rank].contiguous()
