"""Text in blocks, for samples that are drawn block by block."""

from __future__ import annotations

from collections.abc import Iterator


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
