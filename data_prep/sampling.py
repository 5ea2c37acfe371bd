"""A bounded sample spread over a whole corpus, drawn in one pass.

Text is cut into blocks, each block has a key that is a hash, and the blocks with the smallest keys are kept. So every
block has the same chance wherever it stands, memory stays within the budget, and the sample depends on the documents
alone, not on their order.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterator

_MAX_BLOCK_BYTES = 16_384
_MIN_BLOCK_BYTES = 64
_BLOCKS_A_SAMPLE = 64  # so that also a small sample touches many documents


class BlockSample:
    """Keeps at most ``budget_bytes`` of the text offered."""

    def __init__(self, budget_bytes: int) -> None:
        self._budget = budget_bytes
        self._block_bytes = max(_MIN_BLOCK_BYTES, min(_MAX_BLOCK_BYTES, budget_bytes // _BLOCKS_A_SAMPLE))
        self._held = 0
        self._heap: list[tuple[int, bytes]] = []  # (minus the key, block): the largest key on top

    def offer(self, digest: bytes, data: bytes) -> None:
        """Offer one document: its seeded digest and its UTF-8 bytes."""
        for number, (start, stop) in enumerate(cut_blocks(data, self._block_bytes)):
            name = hashlib.blake2b(digest + number.to_bytes(8, "little"), digest_size=8).digest()
            key = int.from_bytes(name, "little")
            if self._held >= self._budget and self._heap and key > -self._heap[0][0]:
                continue
            heapq.heappush(self._heap, (-key, data[start:stop]))
            self._held += stop - start
            while self._held > self._budget:
                self._held -= len(heapq.heappop(self._heap)[1])

    def lines(self) -> Iterator[str]:
        """The sample line by line, in an order of its own, without line ends and empty lines."""
        for _, block in sorted(self._heap, reverse=True):
            yield from (line for line in block.decode("utf-8").split("\n") if line)


def cut_blocks(data: bytes, block_bytes: int) -> Iterator[tuple[int, int]]:
    """Spans (start, stop) of at most ``block_bytes``, cut after a line end if there is any, never in a character."""
    start = 0
    while start < len(data):
        stop = min(start + block_bytes, len(data))
        if stop < len(data):
            newline = data.rfind(b"\n", start, stop)
            if newline >= start:
                stop = newline + 1
            else:
                while data[stop] & 0xC0 == 0x80:  # a continuation byte: step back to the character's first
                    stop -= 1
        yield start, stop
        start = stop
