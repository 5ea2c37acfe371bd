"""First pass over a source: which documents are kept, on which side, in which order.

One keyed hash of a document's text decides all three, so identical texts meet on the same side, and neither file names
nor their order matter. Memory is O(documents): 17 bytes each here and about 100 in the set that finds duplicates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

import numpy as np
import numpy.typing as npt

from configs.corpus import JsonLines, TextTree
from data_prep.readers import Document, read_documents
from data_prep.sampling import BlockSample

DROPPED, TRAIN, HELDOUT = 0, 1, 2
SIDES = {"train": TRAIN, "heldout": HELDOUT}
DIGEST_BYTES = 16


@dataclass(frozen=True)
class SourceScan:
    """One source after the first pass; document n of the reader is row n."""

    name: str
    digests: npt.NDArray[np.uint8]  # [documents, 16]
    sides: npt.NDArray[np.uint8]  # [documents]
    text_bytes: int  # of the documents kept
    duplicates: int
    rejects: int

    def count(self, side: int) -> int:
        """Documents kept on one side."""
        return int(np.count_nonzero(self.sides == side))


def text_digest(data: bytes, seed: int) -> bytes:
    """Sixteen bytes: the first eight choose the side, the last eight the place in the shuffle."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES, key=str(seed).encode()[:64]).digest()


def order_key(digest: bytes) -> int:
    """Sorting by this is the seeded shuffle: no generator's version can change it."""
    return int.from_bytes(digest[8:], "little")


def scan_source(
    source: TextTree | JsonLines,
    *,
    seed: int,
    heldout_fraction: float,
    seen: set[bytes],
    sample: BlockSample | None,
    rejects: TextIO,
    advance: Callable[[int], None],
) -> SourceScan:
    """Read a source once.

    Args:
        seen: digests of all sources so far; extended here, so that a text is kept once in the whole corpus.
        sample: takes the training documents offered, for the tokenizer; held-out text stays unseen also there.
        rejects: gets one JSON line for each record left out.
        advance: told the bytes read.
    """
    limit = int(heldout_fraction * 2**64)
    digests, sides = bytearray(), bytearray()
    text_bytes = duplicates = num_rejects = 0
    for record in read_documents(source):
        if not isinstance(record, Document):
            rejects.write(json.dumps({"source": source.name, "origin": record.origin, "reason": record.reason}) + "\n")
            num_rejects += 1
            continue
        data = record.text.encode("utf-8")
        digest = text_digest(data, seed)
        digests += digest
        if digest in seen:
            sides.append(DROPPED)
            duplicates += 1
        else:
            seen.add(digest)
            text_bytes += len(data)
            side = HELDOUT if int.from_bytes(digest[:8], "little") < limit else TRAIN
            sides.append(side)
            if side == TRAIN and sample is not None:
                sample.offer(digest, data)
        advance(len(data))
    rows = np.frombuffer(digests, np.uint8).reshape(-1, DIGEST_BYTES)
    return SourceScan(source.name, rows, np.frombuffer(sides, np.uint8), text_bytes, duplicates, num_rejects)
