"""`glam prep verify`: every byte of a corpus against its checksums, every index and id against its bounds.

All faults are found, not only the first, and each is told with the shard and the place in it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from data_prep.format import TokenStream, foreign_prefixes
from data_prep.manifest import (
    BLOCK_BYTES,
    DOCUMENT,
    MANIFEST,
    PREP_AGAIN,
    SOURCES,
    Manifest,
    ShardInfo,
    read_manifest,
    token_dtype,
)
from data_prep.megatron_index import read_index
from data_prep.progress import Reporter
from data_prep.storage import sha256_file
from data_prep.summary import SUMMARY, PrepSummary, SideSummary
from data_prep.tokenizer import TOKEN_BYTES_FILE, Tokenizer, find_file
from data_prep.tokenizer_files import HUGGINGFACE_FILE, SENTENCEPIECE_FILE
from data_prep.workers import Workers


@dataclass(frozen=True)
class Damage:
    """One fault: which file, where in it, what is wrong."""

    path: str
    place: str
    fault: str

    def __str__(self) -> str:
        return f"{self.path}: {self.place}: {self.fault}" if self.place else f"{self.path}: {self.fault}"


def find_datasets(folder: Path) -> list[Path]:
    """The datasets a path means: itself, or those of a whole corpus, also where they lack a manifest or all.

    Raises:
        UserError: there are none.
    """
    if (folder / MANIFEST).is_file():
        return [folder]
    found = {path.parent for name in (MANIFEST, "shard-*.json") for path in folder.glob(f"*/*/{name}")}
    with contextlib.suppress(UserError):  # told by verify_all
        found |= {folder / row.side / row.source for row in _summary(folder)}
    if found:
        return sorted(found)
    foreign_prefixes(folder)  # raises, unless pairs made by Megatron are there
    return [folder]


def verify_all(folder: Path, workers: Workers, reporter: Reporter) -> list[Damage]:
    """Every fault below a corpus or a dataset, shard by shard.

    Raises:
        UserError: there is nothing to verify.
    """
    calls: list[tuple[Any, tuple[Any, ...]]] = []
    sizes: list[int] = []
    damages: list[Damage] = []
    try:
        _summary(folder)
    except UserError as error:
        damages.append(Damage(str(folder / SUMMARY), "", error.found))
    for dataset in find_datasets(folder):
        if not (dataset / MANIFEST).is_file():
            if dataset != folder:
                damages.append(Damage(str(dataset / MANIFEST), "", "no such file"))
                continue
            prefixes = foreign_prefixes(dataset)
            calls += [(check_foreign, (prefix,)) for prefix in prefixes]
            sizes += [Path(f"{prefix}.bin").stat().st_size for prefix in prefixes]
            continue
        try:
            manifest = read_manifest(dataset)
        except UserError as error:
            damages.append(Damage(str(dataset / MANIFEST), "", error.found))
            continue
        damages += _check_folder(dataset, manifest)
        num_sources = _num_sources(dataset, manifest)
        calls += [(check_shard, (dataset, manifest.vocab_size, num_sources, shard)) for shard in manifest.shards]
        sizes += [shard.bin_bytes for shard in manifest.shards]
    with reporter.stage("verify", sum(sizes)) as advance:
        found: dict[int, list[Damage]] = {}
        for number, damage in workers.run(calls):
            found[number] = damage
            advance(sizes[number])
    return damages + [damage for number in sorted(found) for damage in found[number]]


def verify(folder: Path | str) -> Manifest:
    """Verify one dataset.

    Raises:
        UserError: names the first fault.
    """
    stream = TokenStream(folder)
    if stream.manifest is None:
        raise UserError(f"{folder} has no {MANIFEST}", "checksums", "only what `glam prep` made can be verified")
    if damages := verify_all(Path(folder), Workers(None, 1), Reporter(None)):
        more = f" (and {len(damages) - 1} more)" if len(damages) > 1 else ""
        raise UserError(f"{damages[0]}{more}", "what was written", PREP_AGAIN)
    return stream.manifest


def _summary(folder: Path) -> tuple[SideSummary, ...]:
    return PrepSummary.load(folder).datasets if (folder / SUMMARY).is_file() else ()


def _check_folder(dataset: Path, manifest: Manifest) -> Iterator[Damage]:
    if _num_sources(dataset, manifest) is None:
        yield Damage(str(dataset / SOURCES), "", "is missing or not the one that was written")
    tokenizer = dataset / manifest.tokenizer
    if tokenizer.is_dir() or (dataset.parent.parent / SUMMARY).is_file():  # a dataset may be taken elsewhere without
        yield from _check_tokenizer(tokenizer, manifest.tokenizer_sha256)


def _check_tokenizer(folder: Path, sha256: str) -> Iterator[Damage]:
    try:
        file = find_file(folder, (SENTENCEPIECE_FILE, HUGGINGFACE_FILE))
        if (found := sha256_file(file)) != sha256:
            yield Damage(str(file), "", f"sha256 {found}, expected {sha256}")
        elif not np.array_equal(np.load(folder / TOKEN_BYTES_FILE), Tokenizer(folder).token_bytes()):
            yield Damage(str(folder / TOKEN_BYTES_FILE), "", "not the bytes of this tokenizer's tokens")
    except UserError as error:
        yield Damage(str(folder), "", error.found)
    except (OSError, ValueError, EOFError) as error:
        yield Damage(str(folder / TOKEN_BYTES_FILE), "", f"{type(error).__name__}: {error}")


def _num_sources(dataset: Path, manifest: Manifest) -> int | None:
    """How many source files there are; None where their list is damaged."""
    path = dataset / SOURCES
    if not path.is_file() or sha256_file(path) != manifest.sources_sha256:
        return None
    return len(json.loads(path.read_bytes()))


def check_shard(dataset: Path, vocab_size: int, num_sources: int | None, shard: ShardInfo) -> list[Damage]:
    """Every fault of one shard; memory: a few blocks."""
    prefix = dataset / shard.name
    damages: list[Damage] = []
    for kind, size in (("bin", shard.bin_bytes), ("idx", shard.idx_bytes), ("docs", shard.docs_bytes)):
        path = Path(f"{prefix}.{kind}")
        found = path.stat().st_size if path.is_file() else None
        if found != size:
            state = "no such file" if found is None else f"{found} bytes"
            damages.append(Damage(str(path), "", f"{state}, expected {size} bytes"))
    if damages:
        return damages
    return [*_check_tokens(prefix, vocab_size, shard), *_check_index(prefix, shard), *_check_origins(
        prefix, num_sources, shard
    )]  # fmt: skip


def _check_tokens(prefix: Path, vocab_size: int, shard: ShardInfo) -> Iterator[Damage]:
    path, dtype = Path(f"{prefix}.bin"), token_dtype(vocab_size)
    try:
        sidecar = json.loads(Path(f"{prefix}.json").read_bytes())
        blocks = sidecar.pop("bin_block_crc32")
        if sidecar != dataclasses.asdict(shard):
            raise ValueError("not what the manifest says")
        if len(blocks) != (expected := -(-shard.bin_bytes // BLOCK_BYTES)):
            raise ValueError(f"{len(blocks)} block checksums, expected {expected}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        yield Damage(f"{prefix}.json", "", f"{type(error).__name__}: {error}")
        blocks = []
    digest, damaged = hashlib.sha256(), list[Damage]()
    with path.open("rb") as file:
        for number, block in enumerate(iter(lambda: file.read(BLOCK_BYTES), b"")):
            digest.update(block)
            start = number * BLOCK_BYTES
            if number < len(blocks) and zlib.crc32(block) != blocks[number]:
                first = start // dtype.itemsize
                place = f"bytes {start}..{start + len(block)} (tokens {first}..{first + len(block) // dtype.itemsize})"
                damaged.append(Damage(str(path), place, "not what was written"))
            ids = np.frombuffer(block, dtype)
            bad = np.flatnonzero((ids < 0) | (ids >= vocab_size))
            if bad.size:
                token = start // dtype.itemsize + int(bad[0])
                fault = f"id {ids[bad[0]]} outside the vocabulary of {vocab_size} ({bad.size} such in this block)"
                yield Damage(str(path), f"token {token}, byte {token * dtype.itemsize}", fault)
    if digest.hexdigest() != shard.bin_sha256:
        whole = Damage(str(path), "", f"sha256 {digest.hexdigest()}, expected {shard.bin_sha256}")
        yield from damaged or [whole]
    elif damaged:
        yield Damage(f"{prefix}.json", "", f"{len(damaged)} block checksums are wrong, the tokens are sound")


def _check_index(prefix: Path, shard: ShardInfo) -> Iterator[Damage]:
    path = Path(f"{prefix}.idx")
    found = sha256_file(path)
    if found == shard.idx_sha256:
        return
    yield Damage(str(path), "", f"sha256 {found}, expected {shard.idx_sha256}")
    yield from _check_bounds(prefix, shard.bin_bytes, shard.documents)


def _check_bounds(prefix: Path, bin_bytes: int, documents: int | None) -> Iterator[Damage]:
    """What an index says, against the tokens beside it."""
    path = f"{prefix}.idx"
    try:
        lengths, indices, dtype, pointers = read_index(prefix)
    except UserError as error:
        yield Damage(path, "", f"{error.found}; expected {error.expected}")
        return
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    wrong = np.flatnonzero((pointers != ends - lengths * np.int64(dtype.itemsize)) | (ends > bin_bytes))
    if wrong.size:
        at = int(wrong[0])
        fault = f"points at byte {pointers[at]} for {lengths[at]} tokens"
        yield Damage(path, f"sequence {at}", f"{fault}; the tokens end at byte {bin_bytes}")
    elif ends.size and int(ends[-1]) != bin_bytes:
        yield Damage(path, "", f"ends at byte {ends[-1]} of {bin_bytes}")
    if documents is not None and len(indices) - 1 != documents:
        yield Damage(path, "", f"{len(indices) - 1} documents, expected {documents}")
    if np.any(np.diff(indices) < 0) or indices[0] != 0 or indices[-1] != len(lengths):
        yield Damage(path, "", f"its documents do not take up sequences 0..{len(lengths)} in order")


def _check_origins(prefix: Path, num_sources: int | None, shard: ShardInfo) -> Iterator[Damage]:
    path = Path(f"{prefix}.docs")
    if (found := sha256_file(path)) != shard.docs_sha256:
        yield Damage(str(path), "", f"sha256 {found}, expected {shard.docs_sha256}")
    files = np.fromfile(path, DOCUMENT)["file"]
    if num_sources is not None and (bad := np.flatnonzero(files >= num_sources)[:1].tolist()):
        yield Damage(str(path), f"document {bad[0]}", f"comes from file {files[bad[0]]} of {num_sources}")


def check_foreign(prefix: Path) -> list[Damage]:
    """What can be told of a pair without checksums."""
    bin_bytes = Path(f"{prefix}.bin").stat().st_size
    return list(_check_bounds(prefix, bin_bytes, None))
