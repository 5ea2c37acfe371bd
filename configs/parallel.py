"""How a run is spread over ranks: the degree of each axis."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from configs.base import Strict


class ParallelConfig(Strict):
    """World size = data x pipeline x tensor. Expert parallelism is folded over data x tensor within a stage.

    Optimizer state is sharded over data-parallel ranks (ZeRO stage 1); that of experts over their replicas.
    """

    data: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"  # auto: as many as the launched ranks allow
    tensor: int = Field(default=1, ge=1)
    pipeline: int = Field(default=1, ge=1)
    expert: int = Field(default=1, ge=1)

    def data_degree(self, world_size: int) -> int:
        """Data-parallel degree when `world_size` ranks are there (rounded down where they do not divide)."""
        return self.data if self.data != "auto" else max(1, world_size // (self.tensor * self.pipeline))
