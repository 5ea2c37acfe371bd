"""Stage `dedup`: of equal and of nearly equal documents the first stays, by the order of sources, files and records.

Each document has keys: one of its folded text, and one for each band of its MinHash. Documents that share a key meet.
All but the first of those that meet go, whether or not the first itself met an earlier one: so each that goes is like
an earlier document, and no graph of all pairs is ever held.

    signatures  a unit's keys, sorted
    meet        a range of keys, over all units: who met whom (an external sort by merging sorted pieces)
    judge       a unit's documents: their fates

Keys have 64 bits: among a billion documents the chance that one is lost to a collision is about 3%.
"""

from __future__ import annotations

from array import array
from functools import lru_cache
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
import rensa
import xxhash

from configs.corpus import NearDuplicates
from data_prep.documents import KEPT, Job, Rows, left_documents, load_unit, origin, reject_line
from data_prep.stages import Counts
from data_prep.storage import save_array, written_atomically

EXACT, NEAR = 1, 2  # fates
_NEAR_BIT = np.uint64(1 << 63)
_DOCUMENT_BITS = 32  # of a rank: the unit above, the place within it below
_RANGE_BYTES = 64 * 2**20  # of keys and ranks, sorted in memory at a time
_ENTRY_BYTES = 16
_SHINGLES_AT_ONCE = 100_000  # of a long document

UInt64s = npt.NDArray[np.uint64]


def signatures_task(job: Job) -> Counts:
    """The keys of a unit's documents: `keys.npy`, sorted, and beside it `ranks.npy`, who has them."""
    spec = job.config.deduplicate
    keys, ranks = array("Q"), array("Q")  # a list would take five times the memory
    base = job.unit.number << _DOCUMENT_BITS
    for number, text, _ in left_documents(job, job.rows(), job.left()):
        words = text.lower().split()
        if spec.exact:
            keys.append(xxhash.xxh3_64_intdigest(" ".join(words).encode("utf-8")))
            ranks.append(base + number)
        if spec.near is not None:
            keys.extend(band_keys(words, spec.near))
            ranks.extend([base + number + int(_NEAR_BIT)] * spec.near.bands)
    unsorted = np.frombuffer(keys, np.uint64)
    order = np.argsort(unsorted, kind="stable")
    save_array(job.path("dedup", "keys.npy"), unsorted[order])
    save_array(job.path("dedup", "ranks.npy"), np.frombuffer(ranks, np.uint64)[order])
    return {"entries": len(keys)}


def band_keys(words: list[str], spec: NearDuplicates) -> list[int]:
    """One key a band of the MinHash of a text's word n-grams; a shorter text is one n-gram."""
    n = spec.ngram_words
    shingles = (" ".join(words[at : at + n]) for at in range(max(1, len(words) - n + 1)))
    minhash = rensa.RMinHash(num_perm=spec.bands * spec.rows, seed=1)
    while some := list(islice(shingles, _SHINGLES_AT_ONCE)):
        minhash.update(some)
    signature = np.array(minhash.digest(), np.uint32).reshape(spec.bands, spec.rows)
    return [xxhash.xxh3_64_intdigest(band.tobytes(), seed=1 + number) for number, band in enumerate(signature)]


def num_ranges(entries: int) -> int:
    """How many ranges of keys, so that each fits in memory."""
    return max(1, -(-entries * _ENTRY_BYTES // _RANGE_BYTES))


def meet_task(folder: Path, units: list[str], number: int, ranges: int) -> Counts:
    """Who shares a key of the `number`-th range with an earlier document: `rNNNNN.later.npy`, sorted, and with whom:
    `rNNNNN.first.npy`. Near meetings carry the highest bit in `first`."""
    low, high = (np.uint64(min(2**64 - 1, 2**64 * n // ranges)) for n in (number, number + 1))
    last = number == ranges - 1
    keys, ranks = [], []
    for unit in units:
        sorted_keys = np.load(folder / f"{unit}.keys.npy", mmap_mode="r")
        start = np.searchsorted(sorted_keys, low)
        stop = len(sorted_keys) if last else np.searchsorted(sorted_keys, high)
        if start < stop:
            keys.append(np.array(sorted_keys[start:stop]))
            # Copied: a slice of a mapping would hold its file open, and there are as many as units.
            ranks.append(np.array(np.load(folder / f"{unit}.ranks.npy", mmap_mode="r")[start:stop]))
    key: UInt64s = np.concatenate(keys) if keys else np.zeros(0, np.uint64)
    rank: UInt64s = np.concatenate(ranks) if ranks else np.zeros(0, np.uint64)
    # Units come in order and their own order is kept, so of equal keys the first is the earliest document.
    order = np.argsort(key, kind="stable")
    key, rank = key[order], rank[order]
    begins = np.ones(len(key), bool)
    begins[1:] = key[1:] != key[:-1]
    first = rank[np.flatnonzero(begins)[np.cumsum(begins) - 1]] if len(rank) else rank
    met = ~begins & ((rank ^ first) & ~_NEAR_BIT != 0)  # two bands of one document may share a key
    later, first = rank[met] & ~_NEAR_BIT, first[met]
    order = np.lexsort((first, later))
    name = range_name(number)
    save_array(folder / f"{name}.later.npy", later[order])
    save_array(folder / f"{name}.first.npy", first[order])
    return {"meetings": int(met.sum())}


def range_name(number: int) -> str:
    """Of the files of a range of keys."""
    return f"r{number:05d}"


def judge_task(job: Job, ranges: int) -> Counts:
    """The fates of a unit's documents; equal counts before nearly equal, then the earliest it met."""
    rows, left = job.rows(), job.left()
    later, first = _meetings(job, ranges)
    order = np.lexsort((first, later))  # exact ones first, as they lack the highest bit
    later, first = later[order], first[order]
    _, which = np.unique(later, return_index=True)
    fates = np.zeros(len(rows), np.uint8)
    near = first[which] >= _NEAR_BIT
    places = (later[which] & np.uint64(2**_DOCUMENT_BITS - 1)).astype(np.int64)
    fates[places] = np.where(near, NEAR, EXACT)
    with written_atomically(job.path("dedup", "rejects.jsonl")) as rejects:
        for number, of, is_near in zip(places.tolist(), (first[which] & ~_NEAR_BIT).tolist(), near.tolist()):
            place = int(rows["file"][number]), int(rows["record"][number])
            rule = "near_duplicate" if is_near else "exact_duplicate"
            rejects.write(reject_line(job.config, job.unit, place, rule, f"like {_origin(job, of)}"))
    save_array(job.path("dedup", "fates.npy"), fates)
    kept = left & (fates == KEPT)
    return {
        "exact": int((fates == EXACT).sum()),
        "near": int((fates == NEAR).sum()),
        "kept": int(kept.sum()),
        "bytes": int(rows["bytes"][kept].sum()),
    }


def _meetings(job: Job, ranges: int) -> tuple[UInt64s, UInt64s]:
    """Of one unit's documents, from all ranges of keys."""
    low, high = (np.uint64(n << _DOCUMENT_BITS) for n in (job.unit.number, job.unit.number + 1))
    later, first = [np.zeros(0, np.uint64)], [np.zeros(0, np.uint64)]
    for number in range(ranges):
        path = job.work / "dedup" / f"{range_name(number)}.later.npy"
        ranks = np.load(path, mmap_mode="r")
        start, stop = np.searchsorted(ranks, [low, high])
        if start < stop:
            later.append(np.array(ranks[start:stop]))
            firsts = np.load(path.with_name(f"{range_name(number)}.first.npy"), mmap_mode="r")
            first.append(np.array(firsts[start:stop]))
    return np.concatenate(later), np.concatenate(first)


def _origin(job: Job, rank: int) -> str:
    """Where the document of this rank stands."""
    unit = load_unit(job.work, rank >> _DOCUMENT_BITS)
    row = rows_of(job.work, unit.name)[rank & (2**_DOCUMENT_BITS - 1)]
    return origin(job.config, unit, int(row["file"]), int(row["record"]))


@lru_cache(maxsize=32)  # documents that repeat tend to stand together; each holds a file open
def rows_of(work: Path, unit: str) -> Rows:
    """The rows of a unit, mapped."""
    return np.load(work / "clean" / f"{unit}.rows.npy", mmap_mode="r")  # type: ignore[no-any-return]
