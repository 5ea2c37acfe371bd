"""What a run may ask of the machines it meets."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator

from configs.base import Strict


class ClusterConfig(Strict):
    """Limits, not capabilities: what is really there is asked at start."""

    collective_timeout_s: float = Field(default=1800.0, gt=0)  # a collective that waits longer ends the job
    # Without a sign of life from a rank's own work (a step, an evaluation, the wait for a save) for so long the job
    # ends, and every rank leaves its stack in RUN/ranks. More than any of those takes; null: only time-outs end it.
    watchdog_s: float | None = Field(default=1200.0, gt=0)
    silent_s: float = Field(default=60.0, ge=5)  # a rank of which nothing is heard for so long counts as gone
    preflight: Literal["full", "quick", "off"] = "quick"  # before the first step of a new run
    device_memory_gib: float | None = Field(default=None, gt=0)  # per rank; null: ask the machine

    @field_validator("preflight", mode="before")
    @classmethod
    def _yaml_reads_off_as_false(cls, value: Any) -> Any:
        return "off" if value is False else value
