"""Integers only: which rank stands where on the axes of parallelism, and which ranks form each group.

Rank = (stage * data + data rank) * tensor + tensor rank, as in DeepSpeed's pipeline grid and megatron-core's order
tp-dp-pp. Expert parallelism is folded over the data x tensor ranks of a stage: contiguous blocks of `expert` ranks
hold all experts once; ranks at the same place of their blocks hold the same experts.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topology:
    """Degrees of each axis and this process's rank."""

    rank: int
    data: int
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1

    @property
    def world_size(self) -> int:
        return self.data * self.tensor * self.pipeline

    @property
    def ranks_per_stage(self) -> int:
        return self.data * self.tensor

    @property
    def stage(self) -> int:
        return self.rank // self.ranks_per_stage

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def data_rank(self) -> int:
        return self.rank % self.ranks_per_stage // self.tensor

    @property
    def expert_rank(self) -> int:
        return self.rank % self.ranks_per_stage % self.expert

    def expert_groups(self) -> list[list[int]]:
        """Ranks that together hold all experts of a stage once."""
        return [list(range(start, start + self.expert)) for start in range(0, self.world_size, self.expert)]

    def expert_data_groups(self) -> list[list[int]]:
        """Ranks of a stage that hold the same experts."""
        groups = []
        for first in range(0, self.world_size, self.ranks_per_stage):
            stage = range(first, first + self.ranks_per_stage)
            groups += [[rank for rank in stage if rank % self.expert == place] for place in range(self.expert)]
        return groups
