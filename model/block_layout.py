"""Which key blocks each row block may look at: one object for the dense oracle, the CPU kernel and the GPU kernel.

G groups of heads that share keys and values (or 1 where all look alike), R row blocks, K blocks a row at most, b tokens
a block, E summary blocks, B batch, S queries, T keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

NONE = -1


@dataclass(frozen=True)
class BlockLayout:
    """Rows are prefix-stable: row i is the same whatever the length.

    Attributes:
        blocks_GRK: int64 key blocks in ascending order, then summary blocks, then NONE. Summary block e is number
            `num_rows + e`: not a stretch of the sequence, but b summary tokens of it (ETC), gathered.
        local_R: int64 first block of a row's window. Summaries count before it only, what is newer is seen anyway.
        summary_T: int64 positions of all summary tokens, ascending; E x b or fewer.
    """

    block_size: int
    blocks_GRK: Tensor
    local_R: Tensor
    summary_T: Tensor

    @property
    def num_rows(self) -> int:
        return self.blocks_GRK.shape[1]

    @property
    def num_summary_blocks(self) -> int:
        return -(-len(self.summary_T) // self.block_size)

    @property
    def has_summaries(self) -> bool:
        return len(self.summary_T) > 0

    def seen_GRR(self) -> Tensor:
        """bool [G, R, R]: which ordinary blocks each row looks at."""
        groups, rows, _ = self.blocks_GRK.shape
        ordinary = (self.blocks_GRK >= 0) & (self.blocks_GRK < rows)
        seen = torch.zeros(groups, rows, rows + 1, dtype=torch.bool, device=self.blocks_GRK.device)
        seen.scatter_(2, self.blocks_GRK.where(ordinary, rows), True)
        return seen[..., :rows]

    def visible(
        self, query_S: Tensor, key_T: Tensor, start_BS: Tensor | None = None, first_BS: Tensor | None = None
    ) -> Tensor:
        """The definition: bool [B or 1, G or 1, S, T], whether the query at a position may look at the key at another.

        Args:
            query_S, key_T: int64 positions; keys may also be [B or 1, G, T].
            start_BS: position at which the document of each query starts. A row block follows the layout of a sequence
                that starts with the block in which the document of its first token does. (With summaries it stays
                that of the whole sequence: segments do not follow documents.)
            first_BS: number of that block, for each query; needed where a row's first token is none of the queries.
        """
        b, row_BS = self.block_size, (query_S // self.block_size)[None]
        if first_BS is None:
            first_BS = self.first_blocks(query_S, start_BS)
        seen = self.seen_GRR()
        group = torch.arange(seen.shape[0], device=key_T.device)[None, :, None, None]
        key = key_T[None, None, None] if key_T.ndim == 1 else key_T[:, :, None]
        block = key // b - first_BS[:, None, :, None]  # counted from the document's first block
        row = (row_BS - first_BS)[:, None, :, None]
        visible = seen[group, row, block.clamp(0, self.num_rows - 1)] & (block >= 0) & (block <= row)
        if self.has_summaries:
            older = key < self.local_R[row_BS][:, None, :, None] * b
            visible = visible | (torch.isin(key, self.summary_T) & older)
        visible = visible & (key <= query_S[:, None])
        return visible if start_BS is None else visible & (key >= start_BS[:, None, :, None])

    def first_blocks(self, query_S: Tensor, start_BS: Tensor | None) -> Tensor:
        """int64 [B or 1, S]: the block in which the document of the first token of each query's row block starts. Each
        row's first token must be among the queries."""
        if start_BS is None or self.has_summaries:
            return torch.zeros_like(query_S)[None]
        first_query = torch.searchsorted(query_S, query_S // self.block_size * self.block_size)
        return start_BS[:, first_query] // self.block_size

    def listed(self, start_BS: Tensor | None) -> Tensor:
        """Key blocks [B or 1, G or 1, R, K] of each row where documents start at `start_BS`, in the terms of
        `blocks_GRK` (see `visible`)."""
        if start_BS is None or self.has_summaries:
            return self.blocks_GRK[None]
        first_BR = start_BS[:, :: self.block_size] // self.block_size
        own_GBRK = self.blocks_GRK[:, torch.arange(self.num_rows, device=first_BR.device) - first_BR]
        return torch.where(own_GBRK >= 0, own_GBRK + first_BR[..., None], own_GBRK).transpose(0, 1)

    def last_row_that_sees(self) -> Tensor:
        """int64 [G, R]: the last row that looks at each block; -1 where none does (a cache may forget it)."""
        rows = torch.arange(self.num_rows, device=self.blocks_GRK.device)
        return torch.where(self.seen_GRR(), rows[:, None], NONE).amax(1)

    def to(self, device: torch.device | str) -> BlockLayout:
        return BlockLayout(
            self.block_size, self.blocks_GRK.to(device), self.local_R.to(device), self.summary_T.to(device)
        )

    def density(self) -> float:
        """Share of the blocks of full causal attention that are looked at."""
        rows = self.num_rows
        return float((self.blocks_GRK >= 0).sum()) / self.blocks_GRK.shape[0] / (rows * (rows + 1) / 2)
