"""How a model is trained: lengths, optimizer, schedule, how often to log, evaluate and save."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from configs.base import Strict


class AdamWConfig(Strict):
    """AdamW (arXiv:1711.05101); norms, biases and position tables are not decayed."""

    kind: Literal["adamw"] = "adamw"
    peak_lr: float = Field(gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)


class CosineSchedule(Strict):
    """Linear warm-up, then a cosine down to `final_fraction` of the peak at the last step."""

    kind: Literal["cosine"] = "cosine"
    warmup_steps: int = Field(ge=0)
    final_fraction: float = Field(default=0.1, ge=0, le=1)


class InverseSqrtSchedule(Strict):
    """Linear warm-up, then peak * sqrt(warmup_steps / step)."""

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"
    warmup_steps: int = Field(ge=1)


class WarmupStableDecay(Strict):
    """Linear warm-up, constant, then linear down to `final_fraction` over the last `decay_steps` (arXiv:2404.06395)."""

    kind: Literal["wsd"] = "wsd"
    warmup_steps: int = Field(ge=0)
    decay_steps: int = Field(ge=0)
    final_fraction: float = Field(default=0.0, ge=0, le=1)


ScheduleConfig = Annotated[CosineSchedule | InverseSqrtSchedule | WarmupStableDecay, Field(discriminator="kind")]


class HealthConfig(Strict):
    """Which steps are skipped, and when skipping is not enough. What is not finite is skipped always."""

    # Loss or gradient norm above the median of the newest applied steps by so many (robust) standard deviations; null:
    # no limit. OLMo-core has 6, of the plain deviation.
    spike_z: float | None = Field(default=8.0, gt=0)
    window_steps: int = Field(default=128, ge=4)
    warmup_steps: int = Field(default=64, ge=4)  # applied steps before anything but finiteness is judged
    # The worst layer's load, 0 (all tokens to the same k experts) to 1 (evenly to all): a fall to below this, from
    # twice as much or more, is a collapse; null: not looked at.
    router_spread: float | None = Field(default=0.2, gt=0, lt=1)
    # After so many skipped steps in a row the run goes back to the last good checkpoint and never draws their samples
    # again (cf. PaLM, arXiv:2204.02311, sec. 5.1); null: it skips for ever.
    max_skips_in_row: int | None = Field(default=3, ge=1)
    max_rollbacks: int = Field(default=5, ge=0)  # of the whole run; then it ends

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.warmup_steps > self.window_steps:
            raise ValueError(f"warmup_steps={self.warmup_steps} must not exceed window_steps={self.window_steps}")
        return self


class TrainConfig(Strict):
    """One step is one optimizer update over `batch_tokens` tokens, all ranks together."""

    steps: int = Field(ge=1)
    sequence_length: int = Field(ge=2)  # S, tokens
    batch_tokens: int = Field(ge=1)
    micro_batch_sequences: int = Field(ge=1)  # sequences a rank holds in flight at a time
    optimizer: AdamWConfig
    schedule: ScheduleConfig
    clip_norm: float | None = Field(default=1.0, gt=0)  # of the global gradient, experts included; null: no clipping
    precision: Literal["float32", "bf16"] = "bf16"  # bf16 keeps float32 masters, accumulation and reduction
    health: HealthConfig = HealthConfig()
    recompute: bool = False  # rebuild each block's activations in the backward pass
    log_every_steps: int = Field(default=10, ge=1)
    eval_every_steps: int = Field(default=1000, ge=1)
    eval_sequences: int = Field(default=256, ge=1)  # of the held-out data, all ranks together
    save_every_steps: int = Field(default=1000, ge=1)
    keep_checkpoints: int = Field(default=3, ge=1)  # the newest so many
    keep_every_steps: int | None = Field(default=None, ge=1)  # and those of every so many steps, for good
    # Go on while a checkpoint is written, at the price of a copy of the optimizer's state in main memory meanwhile.
    async_save: bool = True
    # A checkpoint folder, or a run whose newest is meant: the weights that a new run begins with, at any layout.
    start_from: str | None = None
    stop_after_steps: int | None = Field(default=None, ge=1)  # save and leave with exit code 3 after so many this time
    seed: int = Field(default=0, ge=0, lt=2**32)

    @property
    def batch_sequences(self) -> int:
        return self.batch_tokens // self.sequence_length

    def num_micro_batches(self, data_degree: int) -> int:
        """Micro-batches each data-parallel rank runs per step."""
        return self.batch_sequences // (data_degree * self.micro_batch_sequences)
