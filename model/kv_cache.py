"""Keys and values kept for decoding: of all positions, or of the blocks that a later row can still see.

B batch, G groups of heads that share keys and values, T positions kept, S new positions, N head width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from model.block_layout import BlockLayout
from model.documents import DocumentReader


class KeyValueCache:
    """Keys and values of all positions seen so far by one layer, each [B, G, T, N]."""

    def __init__(self) -> None:
        self.length = 0  # positions seen
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append the newest positions; returns everything cached."""
        self.length += keys.shape[2]
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)
        self.keys, self.values = keys, values
        return keys, values

    @property
    def kept(self) -> int:
        """Positions held, of the group that holds most."""
        return 0 if self.keys is None else self.keys.shape[2]


class BlockCache(KeyValueCache):
    """Holds only what a later row may look at: the window, sinks and columns; of random blocks those that rows to come
    have drawn, up to the length the layout was made for.

    Attributes:
        position_BGT: int64 position of each key held. A group that needs fewer than others holds some that
            `BlockLayout.visible` hides from every row to come.
    """

    def __init__(self, layout: BlockLayout) -> None:
        super().__init__()
        self.layout = layout
        self._last_row = layout.last_row_that_sees()
        self.position_BGT: Tensor | None = None

    @property
    def capacity(self) -> int:
        """Positions it was made for."""
        return self.layout.num_rows * self.layout.block_size

    def append(self, keys: Tensor, values: Tensor) -> Tensor:
        """Add the newest positions, forget nothing yet; returns their positions, int64 [S].

        Raises:
            ValueError: more positions than the layout was made for.
        """
        batch, groups, count, _ = keys.shape
        if self.length + count > self.capacity:
            raise ValueError(f"{self.length + count} positions, the cache was made for {self.capacity}")
        query_S = torch.arange(self.length, self.length + count, device=keys.device)
        new = query_S.expand(batch, groups, -1)
        self.position_BGT = new if self.position_BGT is None else torch.cat((self.position_BGT, new), dim=2)
        self.extend(keys, values)
        return query_S

    def forget(self, start_B: Tensor | None) -> None:
        """Drop what no later row looks at; to be called after the newest positions have been attended from.

        Args:
            start_B: where the newest token's document starts.
        """
        assert self.position_BGT is not None and self.keys is not None and self.values is not None
        b = self.layout.block_size
        if self.length % b:
            return  # within a row: it still needs what it had
        row, position = self.length // b, self.position_BGT
        first_B11 = torch.zeros_like(position[:, :1, :1])
        if start_B is not None and not self.layout.has_summaries:
            first_B11 = (start_B // b)[:, None, None]
        block = position // b - first_B11
        group = torch.arange(self._last_row.shape[0], device=position.device)[None, :, None]
        last = self._last_row[group, block.clamp(0, self.layout.num_rows - 1)] + first_B11
        wanted = (block >= 0) & (last >= row)
        if self.layout.has_summaries and row < self.layout.num_rows:
            wanted = wanted | torch.isin(position, self.layout.summary_T)
        # Groups may want different numbers of positions: all keep as many as the one that wants most.
        order = wanted.to(torch.int8).argsort(dim=2, descending=True, stable=True)[..., : int(wanted.sum(2).max())]
        index = order[..., None].expand(-1, -1, -1, self.keys.shape[3])
        self.position_BGT = position.gather(2, order)
        self.keys, self.values = self.keys.gather(2, index), self.values.gather(2, index)


class DecodingState:
    """What a model remembers of the tokens it has seen: one cache a block, and where the document stands."""

    def __init__(self, layers: list[KeyValueCache], document_end: int | None) -> None:
        self.layers = layers
        self.documents = None if document_end is None else DocumentReader(document_end)

    @property
    def length(self) -> int:
        return self.layers[0].length
