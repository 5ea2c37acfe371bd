"""Carrying tokens to experts and back: the seam that expert parallelism replaces.

T tokens, D width, E experts, K choices a token, N rows: the choices that are kept, sorted by expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import FunctionCtx

from model.router import Routing


@dataclass(frozen=True)
class Dispatched:
    """Rows at the experts' door, and what is needed to bring them home."""

    rows_ND: Tensor  # sorted by local expert
    counts_E: Tensor  # int64 rows of each local expert
    way_back: Any = None  # the dispatcher's own


class Dispatcher(Protocol):
    """Moves rows to the ranks that hold their experts. Routers and experts never hear of ranks."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """Copy each token once per kept choice, sorted by expert."""
        ...

    def combine(self, rows_ND: Tensor, dispatched: Dispatched, routing: Routing) -> Tensor:
        """Sum each token's expert outputs by gate weight: [N, D] -> [T, D]."""
        ...


@dataclass(frozen=True)
class SortedChoices:
    """The kept choices of T x K in order of expert (stable, so in order of token within an expert)."""

    choice_N: Tensor  # int64 position in the flattened [T*K] choices
    token_N: Tensor  # int64 token of each row
    row_of_choice: Tensor | None  # int64 [T*K], the inverse of choice_N; None when some choices were dropped
    counts_E: Tensor  # int64


def sort_choices(routing: Routing, num_experts: int) -> SortedChoices:
    """Plan the gather: rows sorted by expert, so that each expert's are contiguous."""
    k = routing.expert_TK.shape[1]
    expert = routing.expert_TK.flatten()
    if routing.kept_TK is not None:
        # Dropped choices sort behind the last expert and are cut off.
        expert = expert.masked_fill(~routing.kept_TK.flatten(), num_experts)
    choice = torch.argsort(expert, stable=True)
    counts_E = torch.bincount(expert, minlength=num_experts)[:num_experts]
    if routing.kept_TK is not None:
        choice = choice[: int(counts_E.sum())]
        return SortedChoices(choice, choice // k, None, counts_E)
    row_of_choice = torch.empty_like(choice)
    row_of_choice[choice] = torch.arange(len(choice), device=choice.device)
    return SortedChoices(choice, choice // k, row_of_choice, counts_E)


class LocalDispatcher:
    """Every expert is here: dispatch is a gather, combine a weighted sum."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        plan = sort_choices(routing, self.num_experts)
        return Dispatched(gather_rows(x_TD, plan), plan.counts_E, plan)

    def combine(self, rows_ND: Tensor, dispatched: Dispatched, routing: Routing) -> Tensor:
        return combine_rows(rows_ND, routing.weight_TK, dispatched.way_back)


def gather_rows(x_TD: Tensor, plan: SortedChoices) -> Tensor:
    """x[token of row]: [T, D] -> [N, D]."""
    if plan.row_of_choice is None:
        return x_TD.index_select(0, plan.token_N)
    return _Gather.apply(x_TD, plan.token_N, plan.row_of_choice)


def combine_rows(rows_ND: Tensor, weight_TK: Tensor, plan: SortedChoices) -> Tensor:
    """sum_k weight[t, k] * row(t, k): [N, D] -> [T, D]; dropped choices add nothing."""
    num_tokens = weight_TK.shape[0]
    if plan.row_of_choice is None:
        weighted = rows_ND * weight_TK.flatten()[plan.choice_N, None].to(rows_ND.dtype)
        return rows_ND.new_zeros(num_tokens, rows_ND.shape[1]).index_add(0, plan.token_N, weighted)
    return _Combine.apply(rows_ND, weight_TK, plan.token_N, plan.choice_N, plan.row_of_choice)


class _Gather(Function):
    """index_select whose backward gathers each token's K rows and sums them: several times faster than the
    scatter-add autograd would use, and deterministic on a GPU."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_TD: Tensor, token_N: Tensor, row_of_choice: Tensor) -> Tensor:
        ctx.save_for_backward(row_of_choice)
        ctx.num_tokens = x_TD.shape[0]  # type: ignore[attr-defined]
        return x_TD.index_select(0, token_N)

    @staticmethod
    def backward(ctx: Any, grad_ND: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (row_of_choice,) = ctx.saved_tensors
        grad_TKD = grad_ND.index_select(0, row_of_choice).view(ctx.num_tokens, -1, grad_ND.shape[1])
        return grad_TKD.sum(1), None, None


class _Combine(Function):
    """Weighted sum of each token's K rows, as a batched product; its backward is again a gather."""

    @staticmethod
    def forward(
        ctx: FunctionCtx, rows_ND: Tensor, weight_TK: Tensor, token_N: Tensor, choice_N: Tensor, row_of_choice: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rows_ND, weight_TK, token_N, choice_N, row_of_choice)
        rows_TKD = rows_ND.index_select(0, row_of_choice).view(*weight_TK.shape, -1)
        return torch.bmm(weight_TK.to(rows_ND.dtype)[:, None], rows_TKD)[:, 0]

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor, None, None, None]:  # type: ignore[override]
        rows_ND, weight_TK, token_N, choice_N, row_of_choice = ctx.saved_tensors
        carried_ND = grad_TD.index_select(0, token_N)
        # <grad, row> for each row, then back into the order of choices.
        grad_weight_N = (
            torch.linalg.vecdot(carried_ND.float(), rows_ND.float())
            if rows_ND.dtype != torch.float64
            else (torch.linalg.vecdot(carried_ND, rows_ND))
        )
        weight_N = weight_TK.flatten().index_select(0, choice_N).to(grad_TD.dtype)
        grad_rows_ND = carried_ND * weight_N[:, None]
        grad_weight_TK = grad_weight_N.index_select(0, row_of_choice).view_as(weight_TK).to(weight_TK.dtype)
        return grad_rows_ND, grad_weight_TK, None, None, None
