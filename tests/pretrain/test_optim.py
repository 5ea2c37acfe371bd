"""Learning-rate schedules as functions of the step: warm-up, continuity, ends."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.train import TrainConfig
from pretrain.optim import learning_rate, schedule_factor


def train_config(steps: int, peak_lr: float = 3e-4, **schedule: Any) -> TrainConfig:
    tree = {
        "steps": steps,
        "sequence_length": 16,
        "batch_tokens": 16,
        "micro_batch_sequences": 1,
        "optimizer": {"peak_lr": peak_lr},
        "schedule": schedule,
    }
    return TrainConfig.check(tree, where="test")


@st.composite
def trainings(draw: st.DrawFn) -> TrainConfig:
    steps = draw(st.integers(2, 400))
    kind = draw(st.sampled_from(["cosine", "inverse_sqrt", "wsd"]))
    warmup = draw(st.integers(1 if kind == "inverse_sqrt" else 0, steps - 1))
    extra: dict[str, Any] = {}
    if kind != "inverse_sqrt":
        extra["final_fraction"] = draw(st.floats(0, 1))
    if kind == "wsd":
        extra["decay_steps"] = draw(st.integers(0, steps - warmup))
    return train_config(steps, kind=kind, warmup_steps=warmup, **extra)


@settings(deadline=None)
@given(trainings())
def test_rises_then_never_rises(train: TrainConfig) -> None:
    factors = [schedule_factor(step, train) for step in range(train.steps)]
    warmup = train.schedule.warmup_steps
    assert all(0 <= factor <= 1 for factor in factors)
    for step in range(min(warmup, train.steps)):
        assert factors[step] == pytest.approx((step + 1) / warmup), "warm-up is linear and no step is wasted at 0"
    assert all(b <= a + 1e-12 for a, b in pairwise(factors[max(0, warmup - 1) :]))


@settings(deadline=None)
@given(trainings())
def test_has_no_jumps(train: TrainConfig) -> None:
    """After the warm-up each step moves by no more than the steepest slope the form has."""
    schedule, steps = train.schedule, train.steps
    if schedule.kind == "cosine":
        slope = math.pi / 2 * (1 - schedule.final_fraction) / max(1, steps - 1 - schedule.warmup_steps)
    elif schedule.kind == "inverse_sqrt":
        slope = 0.5 / schedule.warmup_steps
    else:
        slope = (1 - schedule.final_fraction) / max(1, schedule.decay_steps)
    start = max(0, schedule.warmup_steps - 1)
    factors = [schedule_factor(step, train) for step in range(start, steps)]
    assert all(abs(b - a) <= slope + 1e-12 for a, b in pairwise(factors))


@settings(deadline=None)
@given(trainings())
def test_rate_is_the_factor_times_the_peak(train: TrainConfig) -> None:
    for step in (0, train.steps // 2, train.steps - 1):
        assert learning_rate(step, train) == train.optimizer.peak_lr * schedule_factor(step, train)


@settings(deadline=None)
@given(st.integers(3, 10_000), st.data())
def test_ends(steps: int, data: st.DataObject) -> None:
    """The peak is met by the last step of the warm-up, the final fraction by the last step of all."""
    warmup, final = data.draw(st.integers(1, steps - 2)), data.draw(st.floats(0, 1))
    cosine = train_config(steps, kind="cosine", warmup_steps=warmup, final_fraction=final)
    decay = data.draw(st.integers(1, steps - warmup))
    wsd = train_config(steps, kind="wsd", warmup_steps=warmup, decay_steps=decay, final_fraction=final)
    sqrt = train_config(steps, kind="inverse_sqrt", warmup_steps=warmup)
    for train in (cosine, wsd, sqrt):
        assert schedule_factor(warmup - 1, train) == 1.0
    for train in (cosine, wsd):
        assert schedule_factor(steps - 1, train) == pytest.approx(final, abs=1e-12)
    assert schedule_factor(4 * warmup - 1, sqrt) == pytest.approx(0.5)


def test_stable_phase_is_stable() -> None:
    train = train_config(100, kind="wsd", warmup_steps=10, decay_steps=20)
    factors = [schedule_factor(step, train) for step in range(100)]
    assert factors[9:80] == [1.0] * 71 and factors[80] < 1.0 and factors[-1] == 0.0


def test_cosine_is_halfway_in_the_middle() -> None:
    train = train_config(101, kind="cosine", warmup_steps=0, final_fraction=0.2)
    assert schedule_factor(0, train) == 1.0
    assert schedule_factor(50, train) == pytest.approx(0.6)


def test_warmup_may_fill_the_whole_run() -> None:
    for kind in ("cosine", "wsd"):
        train = train_config(5, kind=kind, warmup_steps=5, **({"decay_steps": 0} if kind == "wsd" else {}))
        assert [schedule_factor(step, train) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
