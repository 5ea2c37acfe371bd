"""Learning-rate schedules: pure functions of the step."""

from __future__ import annotations

import math

from configs.train import CosineSchedule, InverseSqrtSchedule, TrainConfig


def learning_rate(step: int, train: TrainConfig) -> float:
    """Rate for the update that ends step number `step` (from 0)."""
    return train.optimizer.peak_lr * schedule_factor(step, train)


def schedule_factor(step: int, train: TrainConfig) -> float:
    """Share of the peak rate, 0..1. The first step of a warm-up of n steps uses 1/n."""
    schedule, warmup = train.schedule, train.schedule.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if isinstance(schedule, InverseSqrtSchedule):
        return math.sqrt(warmup / (step + 1))
    final = schedule.final_fraction
    if isinstance(schedule, CosineSchedule):
        progress = (step - warmup) / max(1, train.steps - 1 - warmup)
        return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    remaining = train.steps - 1 - step
    return 1.0 if remaining >= schedule.decay_steps else final + (1 - final) * remaining / schedule.decay_steps
