"""The judge of steps: quiet on healthy runs, awake to jumps; the same decisions after a stop; bounded."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.model import ExpertChoiceRouter, MoEConfig, TopKRouter
from configs.run import RunConfig
from configs.train import HealthConfig
from pretrain.health import (
    COLLAPSE,
    LOSS_SPIKE,
    NORM_SPIKE,
    NOT_FINITE,
    History,
    Judge,
    choices_a_token,
    judge,
    robust_z,
    router_spread,
)
from pretrain.state import TrainState
from tests.tiny import TREE, tiny_config

HEALTH = HealthConfig()
Figures = list[tuple[float, float]]


def healthy_run(seed: int, steps: int, loss_noise: float = 0.02, norm_noise: float = 0.35) -> Figures:
    """Loss: a power law with noise of batches. Norm: log-normal, first high, then creeping up, as norms do."""
    random = np.random.default_rng(seed)
    step = np.arange(1, steps + 1)
    loss = 1.8 + 9 * step**-0.35 + random.normal(0, loss_noise, steps)
    norm = np.exp(random.normal(0, norm_noise, steps)) * (0.3 + 5 / step + step / steps * 0.3)
    return list(zip(loss.tolist(), norm.tolist()))


def judged(figures: Figures, health: HealthConfig = HEALTH, history: History | None = None) -> list[str]:
    """Reasons, step by step, as the loop goes on with the history."""
    history = history or History()
    reasons = []
    for loss, norm in figures:
        reasons.append(judge(history, health, loss, norm).reason)
        if not reasons[-1]:
            history.add(loss, norm, None, health.window_steps)
    return reasons


# ---- quiet --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("loss_noise", "norm_noise"), [(0.02, 0.35), (0.3, 0.7), (0.0005, 0.005)])
def test_no_false_alarm_on_a_healthy_run(seed: int, loss_noise: float, norm_noise: float) -> None:
    assert not any(judged(healthy_run(seed, 3000, loss_noise, norm_noise)))


@pytest.mark.parametrize("seed", range(4))
def test_heavy_tails_cost_a_step_now_and_then_and_never_a_rollback(seed: int) -> None:
    """Small batches of mixed text: Student's t with five degrees of freedom, of which 8 deviations are 1 in 6,000."""
    losses = 3 + 0.05 * np.random.default_rng(seed).standard_t(5, 6000)
    bad = np.flatnonzero(judged([(loss, 1.0) for loss in losses.tolist()]))
    assert len(bad) <= 5 and not (np.diff(bad) == 1).any()


def test_what_falls_is_no_spike() -> None:
    figures = healthy_run(0, 300)
    assert not any(judged([*figures, (0.1, 1e-9)]))


def test_a_figure_that_hardly_moves_makes_no_spike_of_nothing() -> None:
    assert judged([(2.0, 1.0)] * 200 + [(2.0 + 0.15, 2.1)])[-1] == ""
    assert judged([(2.0, 1.0)] * 200 + [(2.0 + 0.17, 1.0)])[-1] == LOSS_SPIKE
    assert judged([(2.0, 1.0)] * 200 + [(2.0, 2.3)])[-1] == NORM_SPIKE


def test_too_little_to_compare_with() -> None:
    figures = healthy_run(0, HEALTH.warmup_steps - 1)
    assert judged([*figures, (99.0, 1e9)])[-1] == ""
    assert judged([*healthy_run(0, HEALTH.warmup_steps), (99.0, 1.0)])[-1] == LOSS_SPIKE


def test_spikes_can_be_allowed() -> None:
    allowing = HealthConfig(spike_z=None)
    reasons = judged([*healthy_run(0, 200), (99.0, 1e9), (math.nan, 1.0)], allowing)
    assert reasons[-2:] == ["", NOT_FINITE]


# ---- awake --------------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(st.integers(0, 5), st.integers(HEALTH.warmup_steps, 2000), st.floats(0.5, 1e6), st.integers(1, 30))
def test_a_jump_is_caught_however_long_it_lasts(seed: int, at: int, height: float, length: int) -> None:
    """Each of its steps: what was refused does not widen the scale; and what comes after is fit again."""
    figures = healthy_run(seed, at + length + 1)
    window = np.array([loss for loss, _ in figures[max(0, at - HEALTH.window_steps) : at]])
    jump = height + 10 * (window.max() - window.min())
    spiked = [(loss + jump * (at <= step < at + length), norm) for step, (loss, norm) in enumerate(figures)]
    reasons = judged(spiked)
    assert reasons[at : at + length] == [LOSS_SPIKE] * length
    assert not any(reasons[:at]) and not reasons[-1]


@given(st.sampled_from([math.nan, math.inf, -math.inf]), st.booleans())
def test_what_is_no_number_is_caught_and_forgotten(bad: float, in_loss: bool) -> None:
    figures = healthy_run(1, 200)
    poisoned = [*figures[:150], (bad, 1.0) if in_loss else (2.0, bad), *figures[150:]]
    reasons = judged(poisoned)
    assert reasons[150] == NOT_FINITE and not any(reasons[:150] + reasons[151:])


def test_one_spike_does_not_hide_the_next() -> None:
    """The plain mean and deviation of all steps would: after 20 spikes of the last 128, six deviations are as far away
    as the spikes."""
    figures = healthy_run(2, 400)
    spiked = [(loss + 4 * (step >= 380), norm) for step, (loss, norm) in enumerate(figures)]
    plain = np.array([loss for loss, _ in spiked[-128:-1]])
    assert spiked[-1][0] < plain.mean() + 6 * plain.std()
    assert judged(spiked)[-20:] == [LOSS_SPIKE] * 20


@given(st.lists(st.floats(-100, 100), min_size=4, max_size=40), st.floats(-100, 100))
def test_robust_z_is_that_of_numpy(before: list[float], value: float) -> None:
    middle = np.median(before)
    spread = max(1.4826 * np.median(np.abs(np.array(before) - middle)), 0.5 * abs(middle), 0.1)
    assert robust_z(value, before, 0.5, 0.1) == pytest.approx((value - middle) / spread, rel=1e-9, abs=1e-9)


# ---- remembered ---------------------------------------------------------------------------------------------------
def test_history_is_bounded() -> None:
    history = History()
    judged(healthy_run(0, 1000), history=history)
    assert history.losses == [loss for loss, _ in healthy_run(0, 1000)[-HEALTH.window_steps :]]
    assert len(history.norms) == HEALTH.window_steps
    assert len(json.dumps(TrainState(history=history).to_json())) < 12_000


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3), st.integers(0, 500))
def test_decisions_after_a_stop_are_those_of_never_stopped(seed: int, stop: int) -> None:
    random = np.random.default_rng(seed)
    figures = [
        (loss * (20 if random.random() < 0.02 else 1), math.nan if random.random() < 0.01 else norm)
        for loss, norm in healthy_run(seed, 501)
    ]
    whole = judged(figures)
    assert set(whole) == {"", LOSS_SPIKE, NOT_FINITE}
    state = TrainState()
    first = judged(figures[:stop], history=state.history)
    resumed = TrainState.from_json(json.loads(json.dumps(state.to_json())))
    assert first + judged(figures[stop:], history=resumed.history) == whole


# ---- routers ------------------------------------------------------------------------------------------------------
def loads(*layers: list[float]) -> dict[int, torch.Tensor]:
    return {n: torch.tensor([*load, 0, 0, 0, 1], dtype=torch.float64) for n, load in enumerate(layers)}


def test_router_spread_goes_from_collapse_to_balance() -> None:
    assert router_spread(loads([5, 5, 5, 5, 5, 5, 5, 5]), 2) == pytest.approx(1)
    assert router_spread(loads([9, 9, 0, 0, 0, 0, 0, 0]), 2) == pytest.approx(0)
    four_of_64 = [1.0] * 4 + [0.0] * 60
    assert router_spread(loads(four_of_64), 2) == pytest.approx(0.2)
    assert router_spread(loads([1.0] * 64, four_of_64), 2) == pytest.approx(0.2), "the worst layer counts"
    assert router_spread({}, 2) is None


MOE = tiny_config().model.moe
COLLAPSED = loads([1, 1, 1, 1], [1, 1, 0, 0])


def test_routers_that_collapse_at_once_are_unfit() -> None:
    assert MOE is not None
    old = History("", [2.0] * HEALTH.warmup_steps, [1.0] * HEALTH.warmup_steps, [0.9] * HEALTH.warmup_steps)
    asked = []

    def ask() -> dict[int, torch.Tensor]:
        asked.append(1)
        return COLLAPSED

    refusing = Judge(old, HEALTH, MOE, ask)
    assert not refusing(2.0, 1.0)
    assert refusing.verdict.reason == COLLAPSE and refusing.verdict.router_spread == pytest.approx(0)
    assert refusing.loads is not None and len(refusing.loads) == 2, "kept for the log, as it can be asked for once"
    assert not Judge(old, HEALTH, MOE, ask)(math.nan, 1.0) and len(asked) == 1, "no need to ask"
    assert Judge(old, HealthConfig(router_spread=None), MOE, ask)(2.0, 1.0) and len(asked) == 1
    balanced = Judge(old, HEALTH, MOE, lambda: loads([1, 1, 1, 1]))
    assert balanced(2.0, 1.0) and balanced.verdict.router_spread == pytest.approx(1)
    old.spreads.pop()
    assert Judge(old, HEALTH, MOE, ask)(2.0, 1.0), "too little to compare with"


def test_routers_that_come_to_it_step_by_step_are_left_alone() -> None:
    history, reasons = History(), []
    for step in range(1000):
        rest = 2 ** (-step / 100)  # of what the experts beside the first two take
        load = loads([1.0, 1.0, rest, rest])
        judging = Judge(history, HEALTH, MOE, lambda load=load: load)  # type: ignore[misc]
        reasons.append(judging(2.0, 1.0))
        history.add(2.0, 1.0, judging.verdict.router_spread, HEALTH.window_steps)
    assert all(reasons) and history.spreads[-1] < 0.05 and len(history.spreads) == HEALTH.window_steps


def test_routers_that_cannot_collapse_are_not_looked_at() -> None:
    assert MOE is not None
    assert choices_a_token(MOE) == 2 and choices_a_token(None) == 0
    for router in (ExpertChoiceRouter(allow_noncausal=True), TopKRouter(k=4)):
        moe = MoEConfig(num_experts=4, expert=MOE.expert, router=router)
        assert choices_a_token(moe) == 0


# ---- configuration ------------------------------------------------------------------------------------------------
def test_warmup_must_fit_the_window() -> None:
    tree: dict[str, Any] = {**TREE, "train": {**TREE["train"], "health": {"window_steps": 20, "warmup_steps": 30}}}
    with pytest.raises(UserError, match="warmup_steps=30 must not exceed window_steps=20"):
        RunConfig.check(tree, "test")
