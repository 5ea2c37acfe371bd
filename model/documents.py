"""Documents packed into one sequence: where the one each token belongs to starts.

B batch, S sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_starts(token_BS: Tensor, end_token: int) -> Tensor:
    """int64 [B, S]: position of the first token of each token's document. A document ends with `end_token`; the first
    may have begun before the sequence."""
    position = torch.arange(token_BS.shape[1], device=token_BS.device)
    follows_end = torch.zeros_like(token_BS, dtype=torch.bool)
    follows_end[:, 1:] = token_BS[:, :-1] == end_token
    return torch.where(follows_end, position, 0).cummax(1).values


class DocumentReader:
    """The same for a sequence that arrives in parts, as in decoding."""

    def __init__(self, end_token: int) -> None:
        self.end_token, self.length = end_token, 0
        self._start_B: Tensor | None = None
        self._ended_B: Tensor | None = None

    def read(self, token_BS: Tensor) -> Tensor:
        """Starts of the documents of the next tokens, counted from the start of the whole sequence."""
        start_BS = document_starts(token_BS, self.end_token)
        if self._start_B is not None and self._ended_B is not None:
            before_B = torch.where(self._ended_B, self.length, self._start_B)
            start_BS = torch.where(start_BS == 0, before_B[:, None], start_BS + self.length)
        self._start_B, self._ended_B = start_BS[:, -1], token_BS[:, -1] == self.end_token
        self.length += token_BS.shape[1]
        return start_BS
