"""Tokens wait on disk, in reading order, until they are gathered into shards in shuffled order.

So memory stays small whatever the corpus; the price is disk for the tokens twice, for a while.
"""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_prep.format import ShardInfo, ShardWriter, token_dtype


class TokenSpool:
    """The documents of one source and side. Memory: 24 bytes a document."""

    def __init__(self, path: Path, vocab_size: int) -> None:
        self._path, self._vocab_size = path, vocab_size
        self._file = path.open("wb", buffering=1 << 20)
        self._lengths, self._text_bytes, self._keys = array("q"), array("q"), array("Q")

    def add(self, ids: npt.NDArray[np.integer[Any]], text_bytes: int, order_key: int) -> None:
        """Append one document: ids [tokens], of the spool's token type."""
        self._file.write(ids.data.cast("B"))
        self._lengths.append(ids.size)
        self._text_bytes.append(text_bytes)
        self._keys.append(order_key)

    def write_shards(self, folder: Path, shard_tokens: int, advance: Callable[[int], None]) -> list[ShardInfo]:
        """Write the documents by rising key into shards of at most ``shard_tokens`` (a longer document alone)."""
        self._file.close()
        ids = np.memmap(self._path, dtype=token_dtype(self._vocab_size), mode="r").view(np.ndarray)
        ends = np.cumsum(np.frombuffer(self._lengths, np.int64))
        order = np.argsort(np.frombuffer(self._keys, np.uint64), kind="stable")
        shards: list[ShardInfo] = []
        position = 0
        while position < order.size:
            with ShardWriter(folder, len(shards), self._vocab_size) as writer:
                while position < order.size:
                    document = order[position]
                    length = self._lengths[document]
                    if writer.tokens and writer.tokens + length > shard_tokens:
                        break
                    writer.add_document(ids[ends[document] - length : ends[document]], self._text_bytes[document])
                    advance(length)
                    position += 1
                shards.append(writer.close())
        return shards

    def close(self) -> None:
        """Let go of the file; a full disk is not reported a second time."""
        with contextlib.suppress(OSError):
            self._file.close()
