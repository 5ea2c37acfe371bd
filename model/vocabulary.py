"""Which rows of the vocabulary's tables are here: the seam that tensor parallelism replaces.

B batch, S sequence, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Vocabulary(Protocol):
    """Finds rows, and lets partial results meet. Embedding and loss never hear of ranks."""

    def rows(self, token: Tensor, num_rows: int) -> tuple[Tensor, Tensor | None]:
        """Row of each token id in a table of `num_rows` here, and a bool mask of those that are here (None: all)."""
        ...

    def leave(self, x_BSD: Tensor) -> Tensor:
        """What looking up rows here found, zero for rows elsewhere -> the embedding."""
        ...

    def enter(self, hidden_BSD: Tensor) -> Tensor:
        """Hidden states on their way to the product with the rows here."""
        ...

    def largest(self, x: Tensor) -> Tensor:
        """Element-wise maximum over all holders of rows."""
        ...

    def total(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Element-wise sums over all holders of rows, of tensors of one shape."""
        ...


class WholeVocabulary:
    """Every row is here."""

    def rows(self, token: Tensor, num_rows: int) -> tuple[Tensor, Tensor | None]:
        return token, None

    def leave(self, x_BSD: Tensor) -> Tensor:
        return x_BSD

    def enter(self, hidden_BSD: Tensor) -> Tensor:
        return hidden_BSD

    def largest(self, x: Tensor) -> Tensor:
        return x

    def total(self, *parts: Tensor) -> tuple[Tensor, ...]:
        return parts
