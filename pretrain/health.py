"""Whether a step may change the weights. Figures are reduced over all ranks, so every rank answers the same.

Unfit is what is not finite (GLaM, arXiv:2112.06905, sec. 5.1), a loss or gradient norm that jumps far above those of
the steps before, and routers that suddenly send all tokens to the same experts. OLMo-core (`skip_step_optimizer.py`;
OLMo 2, arXiv:2501.00656) skips beyond mean + 6 standard deviations of the last 128 steps; here median and median
deviation of applied steps only, so that a spike neither widens the scale for the next one nor, not being a number,
blinds it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from statistics import median

import torch
from torch import Tensor

from configs.model import MoEConfig
from configs.train import HealthConfig
from pretrain.blocklist import Blocked

# Beyond this the square overflows float32 inside the clipping that follows.
LARGEST_NORM = 1e18
_MAD_TO_SIGMA = 1.4826  # a normal distribution's standard deviation in units of its median absolute deviation
# Floors of the spread: figures that hardly move would otherwise make a spike of nothing. With z = 8 a loss must rise by
# 8% (0.08 nats below 1), a norm by a factor of 2.2.
_LEAST_LOSS_SPREAD = 0.01
_LEAST_LOG_NORM_SPREAD = 0.1

NOT_FINITE, LOSS_SPIKE, NORM_SPIKE, COLLAPSE = "not finite", "loss spike", "gradient spike", "router collapse"


@dataclass
class History:
    """Figures of the newest applied steps, at most `window_steps` of them.

    Attributes:
        regime: of data and batch; another one's losses are no measure for this one's.
    """

    regime: str = ""
    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    spreads: list[float] = field(default_factory=list)  # of routers; none where they are not looked at

    def add(self, cross_entropy: float, grad_norm: float, router_spread: float | None, window_steps: int) -> None:
        for figures, new in ((self.losses, cross_entropy), (self.norms, grad_norm), (self.spreads, router_spread)):
            if new is not None:
                figures.append(new)
            del figures[:-window_steps]


@dataclass(frozen=True)
class BadStep:
    """A skipped step; `samples` are those of its global batch. Figures as text, as JSON has no NaN."""

    step: int
    reason: str
    loss: str
    grad_norm: str
    samples: tuple[Blocked, ...]


@dataclass(frozen=True)
class Verdict:
    """What was found.

    Attributes:
        reason: why the step is unfit; empty if it is fit.
        loss_z, norm_z: robust z-scores; None while there is too little to compare with.
        router_spread: the least of all layers, if it was looked at.
    """

    reason: str = ""
    loss_z: float | None = None
    norm_z: float | None = None
    router_spread: float | None = None

    def figures(self) -> dict[str, float]:
        known = {"loss_z": self.loss_z, "norm_z": self.norm_z, "router_spread": self.router_spread}
        return {name: value for name, value in known.items() if value is not None}


def fit_to_apply(cross_entropy: float, grad_norm: float) -> bool:
    """False for a loss or gradient that is not finite."""
    return math.isfinite(cross_entropy) and math.isfinite(grad_norm) and grad_norm < LARGEST_NORM


class Judge:
    """Decides about one step, as the engine's `accept`; afterwards holds the verdict and what it looked at."""

    def __init__(
        self,
        history: History,
        health: HealthConfig,
        moe: MoEConfig | None,
        router_loads: Callable[[], dict[int, Tensor]],
    ) -> None:
        self._history, self._health, self._moe, self._router_loads = history, health, moe, router_loads
        self.verdict = Verdict()
        self.loads: dict[int, Tensor] | None = None  # if they were asked for: they can be taken once a step

    def __call__(self, cross_entropy: float, grad_norm: float) -> bool:
        self.verdict = judge(self._history, self._health, cross_entropy, grad_norm)
        if not self.verdict.reason and self._watches_routers():
            self.loads = self._router_loads()
            spread = router_spread(self.loads, choices_a_token(self._moe))
            reason = COLLAPSE if spread is not None and collapsed(self._history, self._health, spread) else ""
            self.verdict = replace(self.verdict, reason=reason, router_spread=spread)
        return not self.verdict.reason

    def _watches_routers(self) -> bool:
        return self._health.router_spread is not None and choices_a_token(self._moe) > 0


def judge(history: History, health: HealthConfig, cross_entropy: float, grad_norm: float) -> Verdict:
    """Of the loss and the gradient norm before clipping. Only what jumps upwards is bad."""
    if not fit_to_apply(cross_entropy, grad_norm):
        return Verdict(NOT_FINITE)
    if health.spike_z is None or len(history.losses) < health.warmup_steps:
        return Verdict()
    loss_z = robust_z(cross_entropy, history.losses, _LEAST_LOSS_SPREAD)
    # Norms are compared by ratio: they are skewed, and what is large for one model is small for another.
    norm_z = robust_z(_log(grad_norm), [_log(norm) for norm in history.norms], 0.0, _LEAST_LOG_NORM_SPREAD)
    reason = LOSS_SPIKE if loss_z > health.spike_z else NORM_SPIKE if norm_z > health.spike_z else ""
    return Verdict(reason, loss_z, norm_z)


def collapsed(history: History, health: HealthConfig, spread: float) -> bool:
    """Whether routers have collapsed just now: the spread is down to half within half a window. Those that came to it
    step by step would not be mended by going back a little, and small models live with it."""
    if health.router_spread is None or len(history.spreads) < health.warmup_steps:
        return False
    return spread < health.router_spread <= median(history.spreads) / 2


def robust_z(value: float, before: list[float], relative_floor: float, floor: float = _LEAST_LOSS_SPREAD) -> float:
    """Distance from the median in median absolute deviations, scaled to standard deviations.

    Args:
        relative_floor, floor: the deviation counts as at least so much of the median, and so much.
    """
    middle = median(before)
    spread = _MAD_TO_SIGMA * median(abs(one - middle) for one in before)
    return (value - middle) / max(spread, relative_floor * abs(middle), floor)


def choices_a_token(moe: MoEConfig | None) -> int:
    """k of a router that can collapse; 0 where there is none."""
    if moe is None or moe.router.kind == "expert_choice" or moe.router.k >= moe.num_experts:
        return 0
    return moe.router.k


def router_spread(loads: Mapping[int, Tensor], k: int) -> float | None:
    """The least of all layers: where the entropy of the load lies between ln k (every token goes to the same k experts:
    0) and ln E (all experts take as many: 1).

    Args:
        loads: of `Engine.router_loads`.
    """
    if not loads:
        return None
    load_LE = torch.stack([totals[:-4] for totals in loads.values()])
    entropy_L = torch.special.entr(load_LE / load_LE.sum(-1, keepdim=True)).sum(-1)
    least, most = math.log(k), math.log(load_LE.shape[-1])
    return (float(entropy_L.min()) - least) / (most - least)


def _log(norm: float) -> float:
    return math.log(max(norm, 1e-30))
