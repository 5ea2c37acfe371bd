"""How a run is spread over ranks: the degree of each axis, and what is split along it."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from configs.base import Strict


class ParallelConfig(Strict):
    """World size = data x context x tensor x pipeline. Expert parallelism is folded over the data x context x tensor
    ranks of a stage.

    Tensor: heads, ffn width and vocabulary are cut over `tensor` ranks (arXiv:1909.08053).
    Context: every sequence is cut over `context` ranks, in attention the heads instead (arXiv:2309.14509); weights are
    as replicated as over data ranks.
    Expert: by default whole experts lie on a rank, spread over blocks of `expert` of those ranks, each of which routes
    its own part of the tokens.
    """

    data: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"  # auto: as many as the launched ranks allow
    tensor: int = Field(default=1, ge=1)
    pipeline: int = Field(default=1, ge=1)
    expert: int = Field(default=1, ge=1)
    context: int = Field(default=1, ge=1)  # for sequences too long for one rank
    # Between the tensor-parallel layers each tensor rank keeps its part of every sequence only (arXiv:2205.05198).
    sequence: bool = True
    # Cut each expert's ffn width over the tensor ranks too, as GLaM does (arXiv:2112.06905, sec. 4.2: over E and H);
    # expert parallelism then spans data x context ranks only.
    expert_tensor: bool = False
    # dualpipev: each rank holds an early and a late stage; smaller bubble, needs micro-batches >= 2 x pipeline.
    schedule: Literal["1f1b", "dualpipev"] = "1f1b"
    # 1: optimizer state is cut over data x context ranks (that of experts over their replicas); 0: each rank keeps all.
    zero_stage: Literal[0, 1] = 1

    @property
    def num_stages(self) -> int:
        """Pieces the model is cut into along its depth."""
        return self.pipeline * (2 if self.schedule == "dualpipev" and self.pipeline > 1 else 1)

    @property
    def ranks_for_all_experts(self) -> int:
        """Ranks that together hold every expert of a layer once."""
        return self.expert * (self.tensor if self.expert_tensor else 1)

    @property
    def model_ranks(self) -> int:
        """Ranks that pass one micro-batch through the whole model together: each data rank is so many."""
        return self.context * self.tensor * self.pipeline

    @property
    def fewest_ranks(self) -> int:
        """Least number of ranks that carries the layout where `data` is free."""
        return math.lcm(self.ranks_for_all_experts, self.context * self.tensor) * self.pipeline

    def data_degree(self, world_size: int) -> int:
        """Data-parallel degree when `world_size` ranks are there (rounded down where they do not divide)."""
        return self.data if self.data != "auto" else max(1, world_size // self.model_ranks)

    def in_words(self, world_size: int) -> str:
        """The degrees, for people; `context` where it is used."""
        context = f"context {self.context}, " if self.context > 1 else ""
        data = self.data_degree(world_size)
        return f"data {data}, {context}tensor {self.tensor}, pipeline {self.pipeline}, expert {self.expert}"
