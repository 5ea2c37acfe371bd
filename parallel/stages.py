"""Where the chain of layers is cut into pipeline stages. Integers and costs only.

The chain is [embedding, block 0, ..., block L-1, final norm and loss]; a piece is a run of it that holds at least one
block. Under DualPipeV there are two pieces a rank: number r and number 2P - 1 - r, so that rank 0 holds both ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Stages:
    """Cuts of the chain: piece i holds layers bounds[i] to bounds[i + 1] of it."""

    bounds: tuple[int, ...]
    num_ranks: int  # places along the pipeline
    v_shaped: bool = False

    @property
    def num_pieces(self) -> int:
        return len(self.bounds) - 1

    def pieces(self, stage: int) -> list[int]:
        """Numbers of the pieces at a place of the pipeline."""
        return [stage, self.num_pieces - 1 - stage] if self.v_shaped else [stage]

    def blocks(self, stage: int) -> list[int]:
        """Numbers of the blocks at a place of the pipeline."""
        last = self.bounds[-1] - 1
        chain = [layer for piece in self.pieces(stage) for layer in range(self.bounds[piece], self.bounds[piece + 1])]
        return [layer - 1 for layer in chain if 0 < layer < last]

    def embeds(self, stage: int) -> bool:
        """Whether tokens enter here."""
        return stage == 0

    def ends(self, stage: int) -> bool:
        """Whether the final norm and the loss are here."""
        return self.num_pieces - 1 in self.pieces(stage)

    @property
    def ends_apart(self) -> bool:
        """Whether embedding and loss lie at different places."""
        return not self.ends(0)


def cut_by_cost(block_costs: Sequence[float], end_cost: float, num_ranks: int, v_shaped: bool = False) -> Stages:
    """Stages of least time: the costliest place of the pipeline is as cheap as contiguous cuts allow.

    Args:
        block_costs: of each block, in any one unit.
        end_cost: of the final norm, the output product and the loss, in the same unit.
        num_ranks: places along the pipeline.
        v_shaped: two pieces a place (DualPipeV).
    """
    v_shaped = v_shaped and num_ranks > 1
    num_pieces = num_ranks * (2 if v_shaped else 1)
    costs = [*block_costs[:-1], block_costs[-1] + end_cost]
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    # best[n][i]: least possible (largest piece, sum of squares) for the first i blocks in n pieces, and the last cut.
    # The squares choose, among cuts with the same largest piece, the most even one.
    best: list[dict[int, tuple[float, float, int]]] = [{0: (0.0, 0.0, 0)}]
    for n in range(1, num_pieces + 1):
        row: dict[int, tuple[float, float, int]] = {}
        for end in range(n, len(costs) - (num_pieces - n) + 1):
            row[end] = min(
                (max(largest, piece := total[end] - total[start]), squares + piece**2, start)
                for start, (largest, squares, _) in best[-1].items()
                if start < end
            )
        best.append(row)
    cuts = [len(costs)]
    for n in range(num_pieces, 0, -1):
        cuts.append(best[n][cuts[-1]][2])
    inner = [cut + 1 for cut in reversed(cuts)][1:-1]  # the embedding is layer 0 of the chain
    return Stages((0, *inner, len(costs) + 2), num_ranks, v_shaped)
