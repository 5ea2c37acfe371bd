"""Integers only: which rank stands where on the axes of parallelism, and which ranks form each group.

Rank = ((stage * data + data rank) * context + context rank) * tensor + tensor rank, as in megatron-core's order
tp-cp-dp-pp: neighbours share sequences. Data x context ranks are "lanes": each holds every weight of its tensor rank
and an equal number of tokens, which is all that DeepSpeed's pipeline grid and ZeRO need to know (they call them data).
Expert parallelism is folded over the lanes x tensor ranks of a stage: contiguous blocks of `expert` ranks hold all
experts once; ranks at the same place of their blocks hold the same experts. With `expert_tensor` each expert is cut
over the tensor ranks as well, and blocks are of lanes at one tensor rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Topology:
    """Degrees of each axis and this process's rank."""

    rank: int
    data: int  # distinct sequences at a time
    tensor: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: bool = False  # experts are cut over tensor ranks too
    sequence: bool = True  # between tensor-parallel layers, each tensor rank keeps its part of every sequence
    context: int = 1  # parts that every sequence is cut into

    @property
    def world_size(self) -> int:
        return self.ranks_per_stage * self.pipeline

    @property
    def ranks_per_stage(self) -> int:
        return self.lanes * self.tensor

    @property
    def lanes(self) -> int:
        """Ranks of a stage that hold the same weights and other tokens."""
        return self.data * self.context

    @property
    def stage(self) -> int:
        """Place along the pipeline (under DualPipeV: of the rank, which holds two pieces of the model)."""
        return self.rank // self.ranks_per_stage

    @property
    def tensor_rank(self) -> int:
        return self.rank % self.tensor

    @property
    def lane(self) -> int:
        return self.rank % self.ranks_per_stage // self.tensor

    @property
    def data_rank(self) -> int:
        """Which sequences are read here."""
        return self.lane // self.context

    @property
    def context_rank(self) -> int:
        """Which part of them is held here."""
        return self.lane % self.context

    @property
    def _place_among_experts(self) -> int:
        """Number among the ranks that experts are spread and replicated over."""
        return self.lane if self.expert_tensor else self.rank % self.ranks_per_stage

    @property
    def expert_rank(self) -> int:
        return self._place_among_experts % self.expert

    @property
    def expert_replica(self) -> int:
        """Which copy of its experts this rank holds."""
        return self._place_among_experts // self.expert

    @property
    def expert_width(self) -> int:
        """Ranks each expert's ffn width is cut over."""
        return self.tensor if self.expert_tensor else 1

    @property
    def expert_width_rank(self) -> int:
        return self.tensor_rank if self.expert_tensor else 0

    @property
    def experts_have_groups(self) -> bool:
        """Whether experts are spread, or replicated, over other ranks than everything else is."""
        return self.expert > 1 or (self.tensor > 1 and not self.expert_tensor)

    def degrees(self) -> dict[str, int | bool]:
        """The layout, seen from nowhere."""
        return {key: value for key, value in vars(self).items() if key != "rank"}

    def at(self, rank: int) -> Topology:
        """The same layout, seen from another rank."""
        return replace(self, rank=rank)

    def tensor_groups(self) -> list[list[int]]:
        """Ranks that hold parts of the same layers."""
        return self._groups(lambda t: (t.stage, t.lane))

    def context_groups(self) -> list[list[int]]:
        """Ranks that hold the same weights and the parts of the same sequences."""
        return self._groups(lambda t: (t.stage, t.data_rank, t.tensor_rank))

    def lane_groups(self) -> list[list[int]]:
        """Ranks that hold the same weights, experts excepted: gradients are averaged over them."""
        return self._groups(lambda t: (t.stage, t.tensor_rank))

    def end_groups(self) -> list[list[int]]:
        """Pairs of a rank of the first and one of the last stage that hold the same part of the tied embedding."""
        last = self.pipeline - 1
        return [ranks for ranks in self._groups(lambda t: (t.lane, t.tensor_rank), stages=(0, last)) if last]

    def expert_groups(self) -> list[list[int]]:
        """Ranks that together hold all experts of a stage once."""
        return self._groups(lambda t: (t.stage, t.expert_width_rank, t.expert_replica))

    def expert_data_groups(self) -> list[list[int]]:
        """Ranks of a stage that hold the same experts."""
        return self._groups(lambda t: (t.stage, t.expert_width_rank, t.expert_rank))

    def _groups(self, key: Callable[[Topology], tuple[int, ...]], stages: tuple[int, ...] = ()) -> list[list[int]]:
        """Ranks gathered by a key of theirs, each group in order of rank."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.world_size):
            there = self.at(rank)
            if not stages or there.stage in stages:
                found.setdefault(key(there), []).append(rank)
        return list(found.values())
