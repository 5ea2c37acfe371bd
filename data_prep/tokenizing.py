"""Stages `tokenizer` and `tokenize`: the vocabulary, then tokens in shuffled shards.

sample   a unit's share of the text the tokenizer is trained on
encode   a unit's tokens, sorted by the seeded order of documents, one file for each side
shard    one shard: the slices of all units that belong to it, merged (so any corpus is shuffled by writing its
         tokens twice; each shard opens every unit of its source)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from configs.tokenizers import TokenizerSpec
from data_prep.documents import Job, heldout_limit, left_documents
from data_prep.format import ShardWriter
from data_prep.manifest import DOCUMENT, token_dtype
from data_prep.sampling import cut_blocks
from data_prep.stages import Counts
from data_prep.storage import save_array, written_atomically
from data_prep.tokenizer import Tokenizer, make_tokenizer

TRAIN, HELDOUT = "train", "heldout"
SIDES = (TRAIN, HELDOUT)
_BLOCK_BYTES = 16_384
_MIN_BLOCK_BYTES = 64
_BLOCKS_A_SAMPLE = 64  # so that also a small sample touches many documents
_BIN_BITS = 20  # the finest place where shards are cut: a millionth of the corpus
_DOCUMENTS_AT_ONCE = 1024  # as Python objects
# A document of a unit's tokens: `tokens` of them from `start` on, and what the shard says of it.
PIECE = np.dtype([("start", "<i8"), ("tokens", "<i8"), ("bytes", "<u4"), ("file", "<u4"), ("record", "<u8")])


def sample_task(job: Job, fraction: float, budget_bytes: int) -> Counts:
    """Draw blocks of the training documents with this probability, by a hash of text and place, into `sample.txt`.
    Held-out text stays unseen also here."""
    rows, limit = job.rows(), int(fraction * 2**64)
    train = rows["side"] >= heldout_limit(job.config)
    block_bytes = max(_MIN_BLOCK_BYTES, min(_BLOCK_BYTES, budget_bytes // _BLOCKS_A_SAMPLE))
    drawn = 0
    with written_atomically(job.path("tokenizer", "sample.txt")) as file:
        for number, _, data in left_documents(job, rows, job.left() & train):
            order = rows["order"][number].tobytes()
            for block, (start, stop) in enumerate(cut_blocks(data, block_bytes)):
                if xxhash.xxh3_64_intdigest(order + block.to_bytes(8, "little"), seed=3) < limit:
                    file.write(data[start:stop])
                    if data[stop - 1 : stop] != b"\n":
                        file.write(b"\n")
                    drawn += stop - start
    return {"bytes": drawn}


def tokenizer_task(spec: TokenizerSpec, samples: list[Path], folder: Path) -> Counts:
    """Train on the samples, or take over the file named."""
    tokenizer = make_tokenizer(spec, _lines(samples), folder)
    return {
        "vocab_size": tokenizer.vocab_size,
        "eos_id": tokenizer.eos_id,
        "sha256": tokenizer.sha256,
        "lossless": tokenizer.lossless,
    }


def _lines(samples: list[Path]) -> Iterator[str]:
    for path in samples:
        with path.open(encoding="utf-8", newline="\n") as file:
            yield from (line for text in file if (line := text.rstrip("\n")))


def encode_task(job: Job, folder: Path) -> Counts:
    """A unit's documents as tokens, EOS behind each: for each side `<side>.ids` in the order of `<side>.order.npy`
    (uint64 [documents], sorted) with their `<side>.pieces.npy` (PIECE [documents])."""
    tokenizer, rows, left = _tokenizer(folder), job.rows(), job.left()
    dtype = token_dtype(tokenizer.vocab_size)
    eos = np.array([tokenizer.eos_id], np.int32)
    ids = {number: tokenizer.encode(text) for number, text, _ in left_documents(job, rows, left)}
    counts: Counts = {}
    heldout = rows["side"] < heldout_limit(job.config)
    for side in SIDES:
        members = np.flatnonzero(left & (heldout if side == HELDOUT else ~heldout))
        members = members[np.argsort(rows["order"][members], kind="stable")]
        pieces = np.zeros(len(members), PIECE)
        for field in ("bytes", "file", "record"):
            pieces[field] = rows[field][members]
        pieces["tokens"] = [len(ids[number]) + 1 for number in members.tolist()]
        pieces["start"] = np.cumsum(pieces["tokens"]) - pieces["tokens"]
        with written_atomically(job.path("tokenize", f"{side}.ids")) as file:
            for some in np.array_split(members, len(members) // _DOCUMENTS_AT_ONCE + 1):
                parts = [part for number in some.tolist() for part in (ids.pop(number), eos)]
                file.write(np.concatenate(parts or [eos[:0]]).astype(dtype).data.cast("B"))
        save_array(job.path("tokenize", f"{side}.order.npy"), rows["order"][members])
        save_array(job.path("tokenize", f"{side}.pieces.npy"), pieces)
        counts[side] = {
            "documents": len(members),
            "tokens": int(pieces["tokens"].sum()),
            "bytes": int(pieces["bytes"].sum(dtype=np.int64)),
        }
    return counts


def _tokenizer(folder: Path) -> Tokenizer:
    return _opened(folder, folder.stat().st_mtime_ns)


@lru_cache(maxsize=1)  # once a worker process, unless it was made anew
def _opened(folder: Path, _made: int) -> Tokenizer:
    return Tokenizer(folder)


def plan_task(folder: Path, units: list[str], side: str, shard_tokens: int) -> Counts:
    """Where to cut one source and side: shards hold whole bins of the order, as many as fit in `shard_tokens`.
    Returns {"cuts": [first bin of each shard, ..., number of bins]}."""
    bins = np.zeros(2**_BIN_BITS, np.int64)
    for unit in units:
        order = np.load(folder / f"{unit}.{side}.order.npy")
        tokens = np.load(folder / f"{unit}.{side}.pieces.npy")["tokens"]
        np.add.at(bins, (order >> np.uint64(64 - _BIN_BITS)).astype(np.int64), tokens)
    ends = np.cumsum(bins)
    cuts, begun = [0], 0
    while begun < int(ends[-1]):
        cut = max(cuts[-1] + 1, int(np.searchsorted(ends, begun + shard_tokens, side="right")))
        # A bin fuller than a shard stands alone, with the empty ones before it.
        while cut < len(ends) and int(ends[cut - 1]) == begun:
            cut += 1
        cuts.append(cut)
        begun = int(ends[cut - 1])
    cuts[-1] = len(bins)
    return {"cuts": cuts}


def shard_task(
    tokenize: Path, units: list[str], side: str, index: int, cuts: tuple[int, int], tokenizer: Path, folder: Path
) -> Counts:
    """Merge one shard; memory: its tokens, once."""
    model = _tokenizer(tokenizer)
    dtype = token_dtype(model.vocab_size)
    low, high = (np.uint64(cut << (64 - _BIN_BITS)) if cut < 2**_BIN_BITS else None for cut in cuts)
    parts: list[tuple[Path, npt.NDArray[np.void], npt.NDArray[np.uint64]]] = []
    for unit in units:
        order = np.load(tokenize / f"{unit}.{side}.order.npy", mmap_mode="r")
        start = int(np.searchsorted(order, low)) if low is not None else len(order)
        stop = int(np.searchsorted(order, high)) if high is not None else len(order)
        if start < stop:
            pieces = np.array(np.load(tokenize / f"{unit}.{side}.pieces.npy", mmap_mode="r")[start:stop])
            parts.append((tokenize / f"{unit}.{side}.ids", pieces, np.array(order[start:stop])))
    pieces = np.concatenate([part[1] for part in parts])
    ids = np.empty(int(pieces["tokens"].sum()), dtype)
    filled = 0
    for path, piece, _ in parts:
        count = int(piece["tokens"].sum())
        ids[filled : filled + count] = np.fromfile(path, dtype, count, offset=int(piece["start"][0]) * dtype.itemsize)
        filled += count
    ends = np.cumsum(pieces["tokens"])
    sequence = np.argsort(np.concatenate([part[2] for part in parts]), kind="stable")
    documents = np.zeros(len(pieces), DOCUMENT)
    documents["file"], documents["record"] = pieces["file"], pieces["record"]
    with ShardWriter(folder, index, model.vocab_size) as writer:
        for some in np.array_split(sequence, len(sequence) // _DOCUMENTS_AT_ONCE + 1):
            lengths, sizes = pieces["tokens"][some].tolist(), pieces["bytes"][some].tolist()
            for number, end, length, size in zip(some.tolist(), ends[some].tolist(), lengths, sizes):
                writer.add_document(ids[end - length : end], size, documents[number])
        return {"shard": dataclasses.asdict(writer.close())}
