"""Megatron's index file (.idx), writer and reader side by side: where each document lies in the .bin beside it.

Little-endian: magic, version <Q, dtype code <B, sequences <Q, documents + 1 <Q, then int32 lengths [sequences],
int64 byte pointers [sequences], int64 document indices [documents + 1].
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # Megatron's codes, less its floats

Int64s = npt.NDArray[np.int64]


def index_bytes(lengths: Int64s, dtype: np.dtype[Any]) -> bytes:
    """The index of documents of these lengths [documents], in tokens of ``dtype``, each one sequence.

    Raises:
        ValueError: a document is longer than the format can say.
    """
    if int(lengths.max()) > np.iinfo(np.int32).max:
        raise ValueError(f"a document of {lengths.max()} tokens; the format holds at most {np.iinfo(np.int32).max}")
    code = next(code for code, text in DTYPES.items() if np.dtype(text) == dtype)
    pointers = (np.cumsum(lengths) - lengths) * dtype.itemsize
    head = HEADER.pack(MAGIC, 1, code, lengths.size, lengths.size + 1)
    arrays = (lengths.astype("<i4"), pointers.astype("<i8"), np.arange(lengths.size + 1, dtype="<i8"))
    return head + b"".join(values.tobytes() for values in arrays)


def read_index(prefix: Path) -> tuple[npt.NDArray[np.int32], Int64s, np.dtype[Any], Int64s]:
    """Read PREFIX.idx: lengths int32 [sequences], document indices int64 [documents + 1], the token type, and where
    each sequence begins in PREFIX.bin: bytes, int64 [sequences].

    Raises:
        UserError: missing, foreign, truncated or at odds with itself.
    """
    path = Path(f"{prefix}.idx")
    remedy = "copy the pair again; Megatron's preprocess_data.py writes this format"
    if not path.is_file():
        raise UserError(f"{path}: no such file", "the index beside its .bin", remedy)
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise UserError(f"{path} begins with {head[:9]!r}", f"{MAGIC!r}, an indexed dataset", remedy)
    _, version, code, sequences, indices = HEADER.unpack(head)
    if version != 1 or code not in DTYPES:
        expected_code = f"version 1, code one of {sorted(DTYPES)}"
        raise UserError(f"{path}: version {version}, dtype code {code}", expected_code, remedy)
    expected = HEADER.size + 12 * sequences + 8 * indices
    if size not in (expected, expected + sequences):  # multimodal indices end with one mode byte a sequence
        raise UserError(f"{path}: {size} bytes", f"{expected} bytes for {sequences} sequences", remedy)
    data = np.memmap(path, dtype=np.uint8, mode="r").view(np.ndarray)
    lengths = data[HEADER.size : HEADER.size + 4 * sequences].view("<i4")
    documents = data[expected - 8 * indices : expected].view("<i8")
    if lengths.min(initial=0) < 0 or indices < 1 or documents.min() < 0 or documents.max() > sequences:
        raise UserError(f"{path}: lengths or document indices out of range", f"0 <= index <= {sequences}", remedy)
    pointers = data[HEADER.size + 4 * sequences : HEADER.size + 12 * sequences].view("<i8")
    return lengths, documents, np.dtype(DTYPES[code]), pointers
