"""Which key blocks each row block may look at: one object for the dense oracle, the CPU kernel and the GPU kernel.

G groups of heads that share keys and values (or 1 where all look alike), R row blocks, K blocks a row at most, b tokens
a block, E summary blocks, B batch, S queries, T keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

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

    def visible(self, query_S: Tensor, key_T: Tensor, start_BS: Tensor | None = None) -> Tensor:
        """The definition: bool [B or 1, G or 1, S, T], whether the query at a position may look at the key at another.

        Args:
            query_S, key_T: int64 positions; keys may also be [B or 1, G, T].
            start_BS: position at which the document of each query starts. Its rows follow the layout of a sequence that
                starts with the block in which the document does. (With summaries they stay those of the whole sequence:
                segments do not follow documents.)
        """
        b = self.block_size
        start = torch.zeros_like(query_S)[None] if start_BS is None else start_BS
        first = torch.zeros_like(start) if self.has_summaries else start // b
        row = (query_S // b - first)[:, None, :, None]
        group = torch.arange(self.blocks_GRK.shape[0], device=key_T.device)[None, :, None, None]
        key = key_T[None, None, None] if key_T.ndim == 1 else key_T[:, :, None]
        block = key // b - first[:, None, :, None]  # counted from the document's first block
        visible = self.seen_GRR()[group, row, block.clamp(0, self.num_rows - 1)] & (block >= 0) & (block <= row)
        if self.has_summaries:
            older = key < self.local_R[query_S // b][:, None] * b
            visible = visible | (torch.isin(key, self.summary_T) & older)
        return visible & (key <= query_S[:, None]) & (key >= start[:, None, :, None])

    def listed(self, start_BS: Tensor | None) -> Tensor:
        """Key blocks [B or 1, G or 1, R, K] of each row where documents start at `start_BS`, in the terms of
        `blocks_GRK` (see `visible`)."""
        if start_BS is None or self.has_summaries:
            return self.blocks_GRK[None]
        first_BR = start_BS[:, :: self.block_size] // self.block_size
        own_GBRK = self.blocks_GRK[:, torch.arange(self.num_rows, device=first_BR.device) - first_BR]
        return torch.where(own_GBRK >= 0, own_GBRK + first_BR[..., None], own_GBRK).transpose(0, 1)

    def padded_starts(self, start_BS: Tensor) -> Tensor:
        """[B, S] -> [B, R, b]: what fills up the last row is a document of its own."""
        length = start_BS.shape[1]
        return F.pad(start_BS, (0, self.num_rows * self.block_size - length), value=length).unflatten(
            1, (self.num_rows, -1)
        )

    def summaries(self) -> tuple[Tensor, Tensor]:
        """int64 [E x b] positions of the tokens in the summary blocks, twice: what fills up the last block as 0, to be
        gathered, and as a position beyond the sequence, which nobody sees."""
        fill, beyond = -len(self.summary_T) % self.block_size, self.num_rows * self.block_size
        return F.pad(self.summary_T, (0, fill)), F.pad(self.summary_T, (0, fill), value=beyond)

    def last_row_that_sees(self) -> Tensor:
        """int64 [G, R]: the last row that looks at each block; -1 where none does (a cache may forget it)."""
        groups, rows, _ = self.blocks_GRK.shape
        row_GRK = torch.arange(rows, device=self.blocks_GRK.device)[:, None].expand_as(self.blocks_GRK)
        ordinary = (self.blocks_GRK >= 0) & (self.blocks_GRK < rows)
        last = self.blocks_GRK.new_full((groups, rows + 1), NONE)
        block = self.blocks_GRK.where(ordinary, rows)
        return last.scatter_reduce_(1, block.flatten(1), row_GRK.flatten(1), "amax")[:, :rows]

    def to(self, device: torch.device | str) -> BlockLayout:
        return BlockLayout(
            self.block_size, self.blocks_GRK.to(device), self.local_R.to(device), self.summary_T.to(device)
        )

    def density(self) -> float:
        """Share of the blocks of full causal attention that are looked at."""
        rows = self.num_rows
        return float((self.blocks_GRK >= 0).sum()) / self.blocks_GRK.shape[0] / (rows * (rows + 1) / 2)
