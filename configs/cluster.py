"""What a run may ask of the machines it meets."""

from __future__ import annotations

from pydantic import Field

from configs.base import Strict


class ClusterConfig(Strict):
    """Limits, not capabilities: what is really there is asked at start."""

    collective_timeout_s: float = Field(default=1800.0, gt=0)  # a collective that waits longer ends the job
    device_memory_gib: float | None = Field(default=None, gt=0)  # per rank; null: ask the machine
