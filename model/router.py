"""Routers: logits -> which experts each token visits, with what weight, and what that costs in balance.

T tokens (B sequences of S), D width, E experts, K choices a token, G routing groups of t tokens each.
Logits and everything after them are float32, whatever the weights' type (Switch, arXiv:2101.03961, sec. 2.4).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.model import CapacityConfig, ExpertChoiceRouter, MoEConfig, NoisyTopKRouter, TopKRouter


@dataclass(frozen=True)
class Routing:
    """What a router decided; dispatchers and experts read only this."""

    expert_TK: Tensor  # int64: expert of each choice
    weight_TK: Tensor  # float32 gate weight, zero where the choice was dropped
    kept_TK: Tensor | None  # bool: choices that travel; None when all do
    balance_loss: Tensor  # scalar float32, differentiable, uncoefficiented
    z_loss: Tensor  # scalar float32, differentiable, uncoefficiented


class SequenceShare(Protocol):
    """Which part of each sequence is here: the seam that tensor parallelism replaces. Capacity, expert choice and the
    balance loss are matters of whole sequences, so decisions are made on those and then cut."""

    def whole(self, logits_BsE: Tensor) -> Tensor:
        """Logits of the tokens here -> of whole sequences [B, S, E]."""
        ...

    def own(self, decided: Tensor, num_sequences: int) -> Tensor:
        """Decisions [B*S, K] for whole sequences -> for the tokens here."""
        ...


class WholeSequences:
    """Sequences are not split."""

    def whole(self, logits_BsE: Tensor) -> Tensor:
        return logits_BsE

    def own(self, decided: Tensor, num_sequences: int) -> Tensor:
        return decided


class Router(nn.Module):
    """x[B, S, D] -> Routing of its T = B*S tokens. The balance loss is a mean over sequences, which makes it the same
    for every micro-batch size and every layout."""

    def __init__(self, width: int, moe: MoEConfig) -> None:
        super().__init__()
        self.spec, self.num_experts = moe.router, moe.num_experts
        self.weight = nn.Parameter(torch.empty(moe.num_experts, width))
        noisy = isinstance(moe.router, NoisyTopKRouter)
        self.noise_weight = nn.Parameter(torch.empty(moe.num_experts, width)) if noisy else None
        self.share: SequenceShare = WholeSequences()

    def forward(self, x_BSD: Tensor) -> Routing:
        routing, num_sequences = self._route(x_BSD), x_BSD.shape[0]
        return replace(
            routing,
            expert_TK=self.share.own(routing.expert_TK, num_sequences),
            weight_TK=self.share.own(routing.weight_TK, num_sequences),
            kept_TK=None if routing.kept_TK is None else self.share.own(routing.kept_TK, num_sequences),
        )

    def _route(self, x_BSD: Tensor) -> Routing:
        """Routing of whole sequences."""
        logits_BSE = self.share.whole(F.linear(x_BSD.float(), self.weight.float()))
        z_loss = logits_BSE.logsumexp(-1).square().mean()
        if isinstance(self.spec, TopKRouter):
            return route_top_k(logits_BSE, self.spec, z_loss)
        if isinstance(self.spec, ExpertChoiceRouter):
            return route_expert_choice(logits_BSE, self.spec, z_loss)
        assert self.noise_weight is not None
        noise_scale_BSE = None
        if self.training:
            noise_scale_BSE = F.softplus(self.share.whole(F.linear(x_BSD.float(), self.noise_weight.float())))
        return route_noisy_top_k(logits_BSE, noise_scale_BSE, self.spec, z_loss)


def route_top_k(logits_BSE: Tensor, spec: TopKRouter, z_loss: Tensor) -> Routing:
    """GShard / GLaM (k=2, renormalised) and Switch (k=1, not renormalised).

    Weights are renormalised before any choice is dropped. Balance loss: E * sum_e f_e P_e with f the fraction of
    first choices and P the mean probability, 1.0 at perfect balance (arXiv:2006.16668, sec. 2.2; 2101.03961, eq. 4).
    """
    probs_BSE = logits_BSE.softmax(-1)
    expert_BSK = probs_BSE.topk(spec.k, dim=-1).indices
    weight_BSK = probs_BSE.gather(-1, expert_BSK)
    if spec.renormalise:
        weight_BSK = weight_BSK / weight_BSK.sum(-1, keepdim=True)
    num_experts = logits_BSE.shape[-1]
    first_BE = _counts(expert_BSK[..., :1], num_experts) / logits_BSE.shape[1]
    balance_loss = num_experts * (first_BE * probs_BSE.mean(1)).sum(-1).mean()
    return _with_capacity(expert_BSK, weight_BSK, spec.capacity, num_experts, balance_loss, z_loss)


def route_noisy_top_k(
    logits_BSE: Tensor, noise_scale_BSE: Tensor | None, spec: NoisyTopKRouter, z_loss: Tensor
) -> Routing:
    """Shazeer et al. 2017: H = x Wg + N(0,1) softplus(x Wn), softmax over the k kept; no noise when evaluating.

    Balance loss: CV(importance)^2 + CV(load)^2 per sequence, load being the smooth estimate of its appendix A.
    """
    k, num_experts = spec.k, logits_BSE.shape[-1]
    noisy_BSE = logits_BSE
    if noise_scale_BSE is not None:
        noise_scale_BSE = noise_scale_BSE + 1e-2
        noisy_BSE = logits_BSE + torch.randn_like(logits_BSE) * noise_scale_BSE
    expert_BSK = noisy_BSE.topk(k, dim=-1).indices
    weight_BSK = noisy_BSE.gather(-1, expert_BSK).softmax(-1)
    gates_BSE = torch.zeros_like(noisy_BSE).scatter(-1, expert_BSK, weight_BSK)
    balance_loss = _squared_variation(gates_BSE.sum(1)).mean()
    if noise_scale_BSE is not None and k < num_experts:
        # P(e among the k largest if only its own noise were drawn again), against the k-th or (k+1)-th largest.
        top = noisy_BSE.topk(k + 1, dim=-1)
        chosen = torch.zeros_like(noisy_BSE, dtype=torch.bool).scatter(-1, expert_BSK, True)
        threshold = torch.where(chosen, top.values[..., k : k + 1], top.values[..., k - 1 : k])
        load_BE = torch.special.ndtr((logits_BSE - threshold) / noise_scale_BSE).sum(1)
        balance_loss = balance_loss + _squared_variation(load_BE).mean()
    return _with_capacity(expert_BSK, weight_BSK, spec.capacity, num_experts, balance_loss, z_loss)


def route_expert_choice(logits_BSE: Tensor, spec: ExpertChoiceRouter, z_loss: Tensor) -> Routing:
    """Each expert takes its `S / E * capacity_factor` most probable tokens of each sequence (arXiv:2202.09368)."""
    B, S, E = logits_BSE.shape
    probs_BSE = logits_BSE.softmax(-1)
    taken = min(S, math.ceil(S / E * spec.capacity_factor))
    token_BcE = probs_BSE.topk(taken, dim=1).indices
    kept_BSE = torch.zeros_like(probs_BSE, dtype=torch.bool).scatter(1, token_BcE, True)
    expert_TE = torch.arange(E, device=logits_BSE.device).expand(B * S, E)
    weight_TE = (probs_BSE * kept_BSE).flatten(0, 1)
    return Routing(expert_TE, weight_TE, kept_BSE.flatten(0, 1), logits_BSE.new_ones(()), z_loss)


def expert_capacity(capacity: CapacityConfig, group_tokens: int, num_experts: int, k: int) -> int:
    """Slots an expert offers a routing group: ceil(k * group tokens / E * factor)."""
    # Rounded first: 2 * 96 / 8 * 1.1 is 26.400000000000002 in floating point, and an exact 24 must stay 24.
    return math.ceil(round(k * group_tokens / num_experts * capacity.factor, 6))


def _with_capacity(
    expert_BSK: Tensor,
    weight_BSK: Tensor,
    capacity: CapacityConfig | None,
    num_experts: int,
    balance_loss: Tensor,
    z_loss: Tensor,
) -> Routing:
    """Drop choices beyond capacity: within a group all first choices are served before any second (GShard, alg. 1)."""
    k = expert_BSK.shape[-1]
    kept_TK = None
    if capacity is not None:
        group_tokens = capacity.group_tokens or expert_BSK.shape[1]
        slots = expert_capacity(capacity, group_tokens, num_experts, k)
        choice_GKt = expert_BSK.reshape(-1, group_tokens, k).transpose(1, 2)
        hot_GNE = F.one_hot(choice_GKt.flatten(1), num_experts)  # N = K*t choices, first choices first
        rank_GN = ((hot_GNE.cumsum(1) - 1) * hot_GNE).sum(-1)
        kept_TK = (rank_GN < slots).view(-1, k, group_tokens).transpose(1, 2).reshape(-1, k)
        weight_BSK = weight_BSK * kept_TK.view_as(weight_BSK)
    return Routing(expert_BSK.flatten(0, 1), weight_BSK.flatten(0, 1), kept_TK, balance_loss, z_loss)


def _counts(expert_BSK: Tensor, num_experts: int) -> Tensor:
    """How often each expert is named in each sequence, float32 [B, E]."""
    flat_BN = expert_BSK.flatten(1)
    zeros = torch.zeros(flat_BN.shape[0], num_experts, device=flat_BN.device)
    return zeros.scatter_add(1, flat_BN, torch.ones_like(flat_BN, dtype=torch.float32))


def _squared_variation(x_BE: Tensor) -> Tensor:
    """Squared coefficient of variation over experts, [B]."""
    return x_BE.var(-1, unbiased=False) / (x_BE.mean(-1).square() + 1e-10)
