"""Expert parallelism: the dispatcher that reaches experts on other ranks.

R ranks of the group, e = E / R experts a rank, N rows here, M rows received, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE as DeepSpeedMoE
from torch import Tensor, nn
from torch.autograd import Function

from model.block import Block
from model.dispatch import Dispatched, SortedChoices, combine_rows, gather_rows, sort_choices
from model.router import Routing


@dataclass(frozen=True)
class _WayBack:
    plan: SortedChoices  # order of this rank's own rows
    sent: list[int]  # rows sent to each rank
    received: list[int]  # rows received from each rank
    by_source_M: Tensor  # position, among rows sorted by expert, of each row in order of arrival


class AllToAllDispatcher:
    """Rows travel to the rank of their expert and back, each as often as its token chose an expert there."""

    def __init__(self, num_experts: int, group: dist.ProcessGroup) -> None:
        self.num_experts, self.group, self.ranks = num_experts, group, group.size()

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        plan = sort_choices(routing, self.num_experts)
        received_Re = torch.empty_like(plan.counts_E)
        dist.all_to_all_single(received_Re, plan.counts_E, group=self.group)
        received_Re = received_Re.view(self.ranks, -1)
        sent, received = plan.counts_E.view(self.ranks, -1).sum(1).tolist(), received_Re.sum(1).tolist()
        arrived_MD = _AllToAll.apply(gather_rows(x_TD, plan), sent, received, self.group)
        # Rows arrive by source, then expert; the experts want them by expert, whatever the source.
        local_experts = torch.arange(received_Re.shape[1], device=x_TD.device)
        expert_M = local_experts.repeat(self.ranks).repeat_interleave(received_Re.flatten())
        by_expert_M = torch.argsort(expert_M, stable=True)
        by_source_M = torch.empty_like(by_expert_M)
        by_source_M[by_expert_M] = torch.arange(len(by_expert_M), device=x_TD.device)
        rows_MD = _Permute.apply(arrived_MD, by_expert_M, by_source_M)
        return Dispatched(rows_MD, received_Re.sum(0), _WayBack(plan, sent, received, by_source_M))

    def combine(self, rows_MD: Tensor, dispatched: Dispatched, routing: Routing) -> Tensor:
        way: _WayBack = dispatched.way_back
        by_expert_M = torch.empty_like(way.by_source_M)
        by_expert_M[way.by_source_M] = torch.arange(len(by_expert_M), device=rows_MD.device)
        leaving_MD = _Permute.apply(rows_MD, way.by_source_M, by_expert_M)
        home_ND = _AllToAll.apply(leaving_MD, way.received, way.sent, self.group)
        return combine_rows(home_ND, routing.weight_TK, way.plan)


class _AllToAll(Function):
    """Rows split by `sent` go out, rows split by `received` come in; the backward pass is the reverse journey."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _exchange(grad, ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(received), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), received, sent, group=group)
    return out


class _Permute(Function):
    """rows[order]; the backward pass is a gather too, as the inverse is known."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return grad.index_select(0, ctx.saved_tensors[0]), None, None


class ExpertMarker(DeepSpeedMoE):
    """A layer without parameters that tells DeepSpeed's engine this stage has experts.

    Upstream (deepspeed 0.19.8, runtime/engine.py `_configure_distributed_model`): only an instance of
    `deepspeed.moe.layer.MoE` makes the engine reduce expert gradients over expert replicas. Its own experts are deep
    copies of one another and its gate draws the second expert with noise, so ours do the work.
    """

    def __init__(self, num_experts: int) -> None:
        nn.Module.__init__(self)
        self.num_experts = num_experts

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Groups were handed over before (`parallel.groups`)."""


def spread_experts(blocks: Iterable[Block], group: dist.ProcessGroup, group_name: str) -> None:
    """Give blocks that hold experts their all-to-all, and mark expert parameters for DeepSpeed.

    Args:
        group: the ranks that hold the layer's other experts.
        group_name: DeepSpeed's key for it.
    """
    for block in blocks:
        if block.moe is None:
            continue
        if group.size() > 1:
            block.moe.dispatcher = AllToAllDispatcher(block.moe.num_experts, group)
        for parameter in block.moe.experts.parameters():
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter.group_name = group_name  # type: ignore[attr-defined]
