"""Tensor parallelism, and sequence parallelism within it: what happens where a layer's parts meet.

The layers stay those of `model/`; cut weights make them compute a part of the answer. Each region (attention, dense
feed-forward, experts, vocabulary) is entered and left through a pair of collectives whose backward passes mirror them
(Megatron-LM, arXiv:1909.08053, sec. 3; with the sequence split between regions: arXiv:2205.05198, sec. 4.2.2).

B batch, S sequence, s = S / tensor ranks, D width, E experts, K choices a token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function

from parallel.part import Part

Op = Callable[[Tensor, dist.ProcessGroup], Tensor]


# ---- operations on [B, S or s, ...] -----------------------------------------------------------------------------
def keep(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x.view_as(x)


def add_up(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, on each."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


def gather(x_Bs: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Parts of each sequence -> whole ones."""
    parts = x_Bs.new_empty(group.size(), *x_Bs.shape)
    dist.all_gather_into_tensor(parts.flatten(0, 1), x_Bs.contiguous(), group=group)
    return parts.transpose(0, 1).reshape(x_Bs.shape[0], -1, *x_Bs.shape[2:])


def add_up_own(x_BS: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over ranks, of this rank's part of each sequence."""
    parts = x_BS.unflatten(1, (group.size(), -1)).transpose(0, 1).contiguous()
    own = torch.empty_like(parts[0])
    dist.reduce_scatter_tensor(own, parts.flatten(0, 1), group=group)
    return own


def own(x_BS: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's part of each sequence."""
    return x_BS.unflatten(1, (group.size(), -1))[:, group.rank()].contiguous()


def the_firsts(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """What the first rank of the group has."""
    x = x.clone(memory_format=torch.contiguous_format)
    dist.broadcast(x, group=group, group_src=0)
    return x


class _Pass(Function):
    """One operation forward, another backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Op, back: Op, group: dist.ProcessGroup) -> Tensor:
        ctx.back, ctx.group = back, group
        return there(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return ctx.back(grad, ctx.group), None, None, None


class Regions:
    """How a region of partial layers is entered and left."""

    def __init__(self, group: dist.ProcessGroup, split_sequence: bool) -> None:
        self.group = group
        self._enter: tuple[Op, Op] = (gather, add_up_own) if split_sequence else (keep, add_up)
        self.split_sequence = split_sequence

    def enter(self, x: Tensor) -> Tensor:
        """[B, S or s, D] -> [B, S, D], the same on each rank; each rank adds a part to its gradient."""
        return _Pass.apply(x, *self._enter, self.group)

    def leave(self, x: Tensor) -> Tensor:
        """Partial [B, S, D] -> their sum, [B, S or s, D]."""
        return _Pass.apply(x, *reversed(self._enter), self.group)

    def divide(self, x: Tensor) -> Tensor:
        """[B, S or s, D] -> this rank's tokens, [B, s, D]."""
        return x if self.split_sequence else _Pass.apply(x, own, gather, self.group)

    def unite(self, x: Tensor) -> Tensor:
        """The reverse of `divide`."""
        return x if self.split_sequence else _Pass.apply(x, gather, own, self.group)


class SplitSequences:
    """The router's view where each tensor rank routes its own tokens (`model.router.SequenceShare`)."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def whole(self, logits_BsE: Tensor) -> Tensor:
        # Each rank decides on the same whole sequences, so the gradient of its part is whole already: no sum.
        return _Pass.apply(logits_BsE, gather, own, self.group)

    def own(self, decided: Tensor, num_sequences: int) -> Tensor:
        return own(decided.unflatten(0, (num_sequences, -1)), self.group).flatten(0, 1)


class SameDecisions:
    """The router's view where tensor ranks hold parts of every expert: all must decide alike, to the bit. Their copies
    of its weights may differ by the order in which their data-parallel groups summed gradients, so one decides."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def whole(self, logits_BSE: Tensor) -> Tensor:
        return _Pass.apply(logits_BSE, the_firsts, keep, self.group)

    def own(self, decided: Tensor, num_sequences: int) -> Tensor:
        return decided


class SplitVocabulary:
    """Rows cut evenly over tensor ranks (`model.vocabulary.Vocabulary`)."""

    def __init__(self, regions: Regions) -> None:
        self.regions, self.group = regions, regions.group
        self.enter, self.leave = regions.enter, regions.leave

    def rows(self, token: Tensor, num_rows: int) -> tuple[Tensor, Tensor | None]:
        row = token - num_rows * self.group.rank()
        here = (row >= 0) & (row < num_rows)
        return row.where(here, 0), here

    def largest(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, op=dist.ReduceOp.MAX, group=self.group)
        return x

    def total(self, *parts: Tensor) -> tuple[Tensor, ...]:
        together = torch.stack(parts)
        dist.all_reduce(together, group=self.group)
        return together.unbind(0)


def split_tensors(part: Part, group: dist.ProcessGroup) -> None:
    """Let the cut layers of a rank's part meet those of its tensor ranks: entrances and exits for every region."""
    regions = Regions(group, part.topology.sequence)
    part.model.embed.vocabulary = SplitVocabulary(regions)
    for block in part.local_blocks().values():
        _wrap(block.attention, regions.enter, regions.leave)
        if (blocks := block.attention.blocks) is not None:
            blocks.groups = own_range(blocks.groups, group.rank(), group.size())
        if block.ffn is not None:
            _wrap(block.ffn, regions.enter, regions.leave)
        if block.moe is not None and part.topology.expert_tensor:
            _wrap(block.moe, regions.enter, regions.leave)
            block.moe.router.share = SameDecisions(group)
        elif block.moe is not None:
            _wrap(block.moe, regions.divide, regions.unite)
            block.moe.router.share = SplitSequences(group)


def own_range(numbers: range, rank: int, ranks: int) -> range:
    """The part of evenly cut numbers that is a rank's."""
    count = len(numbers) // ranks
    return numbers[rank * count : (rank + 1) * count]


def _wrap(module: Any, enter: Callable[[Tensor], Tensor], leave: Callable[[Tensor], Tensor]) -> None:
    """Hooks around a module's forward pass; names of parameters stay as they are."""

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return enter(args[0]), *args[1:]

    def after(_: nn.Module, args: tuple[Any, ...], out: Any) -> Any:
        return (leave(out[0]), *out[1:]) if isinstance(out, tuple) else leave(out)

    module.register_forward_pre_hook(before)
    module.register_forward_hook(after)
