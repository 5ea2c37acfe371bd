"""The experts of one MoE layer: many small feed-forward layers applied to rows sorted by expert.

N rows (one per kept choice), E experts held here, D width, F ffn width. Weights are stacked [E, out, in].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.model import Activation, FeedForwardConfig
from model.feedforward import activate


class Experts(nn.Module):
    """rows[N, D], sorted by expert, and counts[E] summing to N -> [N, D]."""

    def __init__(self, num_experts: int, width: int, config: FeedForwardConfig) -> None:
        super().__init__()
        self.config = config
        self.gate = nn.Parameter(torch.empty(num_experts, config.width, width)) if config.gated else None
        self.up = nn.Parameter(torch.empty(num_experts, config.width, width))
        self.down = nn.Parameter(torch.empty(num_experts, width, config.width))

    def forward(self, rows_ND: Tensor, counts_E: Tensor) -> Tensor:
        apply = experts_by_grouped_product if self._suits_grouped_product(rows_ND.dtype) else experts_by_loop
        return apply(rows_ND, counts_E, self.gate, self.up, self.down, self.config.activation)

    def _suits_grouped_product(self, dtype: torch.dtype) -> bool:
        """It knows no float64, which gradient checks need, and wants rows of multiples of 16 bytes."""
        row_bytes = (size * dtype.itemsize for size in self.up.shape[1:])
        return dtype != torch.float64 and all(size % 16 == 0 for size in row_bytes)


def experts_by_loop(
    rows_ND: Tensor, counts_E: Tensor, gate_EFD: Tensor | None, up_EFD: Tensor, down_EDF: Tensor, kind: Activation
) -> Tensor:
    """The slow twin: one expert after the other, plain products, gradients by autograd.

    Weights are unbound first: indexing the stack would make autograd build E gradients of the whole stack.
    """
    gates = gate_EFD.unbind(0) if gate_EFD is not None else [None] * len(up_EFD)
    outs = []
    for rows, gate, up, down in zip(rows_ND.split(counts_E.tolist()), gates, up_EFD.unbind(0), down_EDF.unbind(0)):
        hidden = F.linear(rows, up)
        hidden = activate(hidden, kind) if gate is None else activate(F.linear(rows, gate), kind) * hidden
        outs.append(F.linear(hidden, down))
    return torch.cat(outs)


def experts_by_grouped_product(
    rows_ND: Tensor, counts_E: Tensor, gate_EFD: Tensor | None, up_EFD: Tensor, down_EDF: Tensor, kind: Activation
) -> Tensor:
    """All experts in one grouped matrix product for each weight (`torch.nn.functional.grouped_mm`; no float64)."""
    ends_E = counts_E.cumsum(0, dtype=torch.int32)
    hidden = F.grouped_mm(rows_ND, up_EFD.transpose(1, 2), offs=ends_E)
    if gate_EFD is None:
        hidden = activate(hidden, kind)
    else:
        hidden = activate(F.grouped_mm(rows_ND, gate_EFD.transpose(1, 2), offs=ends_E), kind) * hidden
    return F.grouped_mm(hidden, down_EDF.transpose(1, 2), offs=ends_E)
