"""Experts on a CPU: one at a time, so that an expert's activations stay in the cache between its products.

N rows sorted by expert, E experts, D width, F ffn width. Compared with a grouped product over all rows, the memory
traffic of the activation function goes away, and weight gradients are written once, into place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from configs.model import Activation

_aten = torch.ops.aten


def experts_in_turn(
    rows_ND: Tensor, counts_E: Tensor, gate_EFD: Tensor | None, up_EFD: Tensor, down_EDF: Tensor, kind: Activation
) -> Tensor:
    """`down(act(up(x)))`, or gated `down(act(gate(x)) * up(x))`, for each expert's rows: [N, D] -> [N, D]."""
    return _InTurn.apply(rows_ND, counts_E.tolist(), gate_EFD, up_EFD, down_EDF, kind)


class _InTurn(Function):
    @staticmethod
    def forward(
        ctx: Any, rows_ND: Tensor, counts: list[int], gate: Tensor | None, up: Tensor, down: Tensor, kind: Activation
    ) -> Tensor:
        num_rows, width = rows_ND.shape[0], up.shape[1]
        lifted = rows_ND.new_empty(num_rows, width)
        gated = rows_ND.new_empty(num_rows, width) if gate is not None else None
        hidden = rows_ND.new_empty(num_rows, width)
        out = torch.empty_like(rows_ND)
        for expert, rows in _rows_of(counts):
            torch.mm(rows_ND[rows], up[expert].t(), out=lifted[rows])
            if gate is None or gated is None:
                _activate(lifted[rows], kind, hidden[rows])
            else:
                torch.mm(rows_ND[rows], gate[expert].t(), out=gated[rows])
                _activate(gated[rows], kind, hidden[rows])
                hidden[rows].mul_(lifted[rows])
            torch.mm(hidden[rows], down[expert].t(), out=out[rows])
        ctx.save_for_backward(rows_ND, lifted, gated, hidden, gate, up, down)
        ctx.counts, ctx.kind = counts, kind
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        rows_ND, lifted, gated, hidden, gate, up, down = ctx.saved_tensors
        kind, grad_out = ctx.kind, grad_out.contiguous()
        grad_rows, grad_up, grad_down = torch.empty_like(rows_ND), torch.zeros_like(up), torch.zeros_like(down)
        grad_gate = torch.zeros_like(gate) if gate is not None else None
        scratch = rows_ND.new_empty(max(ctx.counts, default=0), up.shape[1])
        scratch_gate = torch.empty_like(scratch) if gate is not None else None
        for expert, rows in _rows_of(ctx.counts):
            size = rows.stop - rows.start
            grad = torch.mm(grad_out[rows], down[expert], out=scratch[:size])
            torch.mm(grad_out[rows].t(), hidden[rows], out=grad_down[expert])
            if grad_gate is None or scratch_gate is None:
                _activate_backward(grad, lifted[rows], kind)
                torch.mm(grad, up[expert], out=grad_rows[rows])
            else:
                through_gate = torch.mul(grad, lifted[rows], out=scratch_gate[:size])
                _activate_backward(through_gate, gated[rows], kind)
                torch.mm(through_gate, gate[expert], out=grad_rows[rows])
                torch.mm(through_gate.t(), rows_ND[rows], out=grad_gate[expert])
                # The gate's activation again, into the scratch it no longer needs: cheaper than having kept it.
                _activate(gated[rows], kind, through_gate)
                grad.mul_(through_gate)
                grad_rows[rows].addmm_(grad, up[expert])
            torch.mm(grad.t(), rows_ND[rows], out=grad_up[expert])
        return grad_rows, None, grad_gate, grad_up, grad_down, None


def _rows_of(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """(expert, its rows), for experts that have any."""
    start = 0
    for expert, count in enumerate(counts):
        if count:
            yield expert, slice(start, start + count)
        start += count


def _activate(x: Tensor, kind: Activation, out: Tensor) -> None:
    if kind == "gelu":
        _aten.gelu.out(x, approximate="tanh", out=out)
    elif kind == "relu":
        torch.clamp_min(x, 0, out=out)
    else:
        _aten.silu.out(x, out=out)


def _activate_backward(grad: Tensor, x: Tensor, kind: Activation) -> None:
    """In place: `grad` of the activation's output becomes that of its input x."""
    if kind == "gelu":
        _aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad)
    elif kind == "relu":
        _aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad)
    else:
        _aten.silu_backward.grad_input(grad, x, grad_input=grad)
