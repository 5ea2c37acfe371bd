"""The mixture-of-experts layer: router, dispatcher, experts.

B batch, S sequence, T = B*S tokens, D width, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from configs.model import MoEConfig
from model.dispatch import Dispatcher, LocalDispatcher
from model.experts import Experts
from model.router import Router


@dataclass(frozen=True)
class MoEReport:
    """What one forward pass of one layer tells the log, detached."""

    load_E: Tensor  # float32, kept choices of each expert
    num_choices: int  # choices made, dropped ones included
    balance_loss: Tensor
    z_loss: Tensor


class MoE(nn.Module):
    """x[B, S, D] -> (y[B, S, D], auxiliary loss, report). No coefficient is left to apply to the auxiliary loss."""

    def __init__(self, width: int, config: MoEConfig) -> None:
        super().__init__()
        self.balance_coef, self.z_coef = config.router.balance_coef, config.router.z_coef
        self.num_experts = config.num_experts
        self.router = Router(width, config)
        self.experts = Experts(config.num_experts, width, config.expert)
        self.dispatcher: Dispatcher = LocalDispatcher(config.num_experts)

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor, MoEReport]:
        routing = self.router(x_BSD)
        dispatched = self.dispatcher.dispatch(x_BSD.flatten(0, 1), routing)
        rows_ND = self.experts(dispatched.rows_ND, dispatched.counts_E)
        y_TD = self.dispatcher.combine(rows_ND, dispatched, routing)
        aux_loss = self.balance_coef * routing.balance_loss + self.z_coef * routing.z_loss
        chosen = routing.expert_TK if routing.kept_TK is None else routing.expert_TK[routing.kept_TK]
        report = MoEReport(
            torch.bincount(chosen.flatten(), minlength=self.num_experts).float(),
            routing.expert_TK.numel(),
            routing.balance_loss.detach(),
            routing.z_loss.detach(),
        )
        return y_TD.view_as(x_BSD), aux_loss, report


class MoETotals:
    """Sums of reports over the micro-batches of a step. Kept beside the layer, outside autograd and checkpoints."""

    def __init__(self) -> None:
        self.reports: list[MoEReport] = []

    def add(self, report: MoEReport) -> None:
        self.reports.append(report)

    def take(self) -> Tensor | None:
        """Sums as one float32 vector [load of E experts, choices, balance loss, z-loss, passes]; starts anew."""
        if not self.reports:
            return None
        reports, self.reports = self.reports, []
        load_E = torch.stack([r.load_E for r in reports]).sum(0)
        scalars = torch.stack(
            [
                load_E.new_tensor(float(sum(r.num_choices for r in reports))),
                torch.stack([r.balance_loss for r in reports]).sum(),
                torch.stack([r.z_loss for r in reports]).sum(),
                load_E.new_tensor(float(len(reports))),
            ]
        )
        return torch.cat((load_E, scalars))
