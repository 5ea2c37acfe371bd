"""The on-disk format of tokens: writer and reader side by side.

A dataset is a folder of shards. A shard is a pair in Megatron's indexed format, a sequence a document, EOS at its end:
  shard-00000.bin   token ids, little-endian, uint16 below 65,500 vocabulary entries, else int32
  shard-00000.idx   where each document lies (data_prep.megatron_index)
  shard-00000.docs  where each document came from (data_prep.manifest.DOCUMENT); Megatron leaves it alone
  shard-00000.json  its counts, sizes in bytes and checksums
beside them `sources.json`, the source files, and `manifest.json`, written last: a folder with a manifest is complete.
Pairs made by Megatron are read without.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property, lru_cache
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.errors import UserError
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
from data_prep.megatron_index import Int64s, index_bytes, read_index
from data_prep.storage import publish, temporary_name, write_atomically

_MAX_OPEN_FILES = 128
Ids = npt.NDArray[np.integer[Any]]


class ShardWriter:
    """Writes one shard under temporary names; `close` gives it its names, an error in its context removes it."""

    def __init__(self, folder: Path | str, index: int, vocab_size: int) -> None:
        self._folder, self._name = Path(folder), f"shard-{index:05d}"
        self._vocab_size, self._dtype = vocab_size, token_dtype(vocab_size)
        self._lengths, self._origins = array("q"), bytearray()
        self._text_bytes = 0
        self._waiting, self._digest, self._block_crc32 = bytearray(), hashlib.sha256(), array("L")
        self._temporary = {k: temporary_name(self._folder / f"{self._name}.{k}") for k in ("bin", "idx", "docs")}
        self._bin = self._temporary["bin"].open("wb", buffering=0)
        self.tokens = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.abort()
        elif not self._bin.closed:
            self.close()

    def add_document(self, ids: Ids, text_bytes: int, origin: np.void | None = None) -> None:
        """Append one document: ids [tokens], EOS included, and where it came from (DOCUMENT).

        Raises:
            ValueError: no ids, or an id outside the vocabulary; nothing was written.
        """
        if ids.ndim != 1 or ids.size == 0:
            raise ValueError(f"a document of shape {ids.shape}; expected [tokens] with at least the EOS id")
        if int(ids.min()) < 0 or int(ids.max()) >= self._vocab_size:
            raise ValueError(f"token ids {ids.min()}..{ids.max()} outside the vocabulary of {self._vocab_size}")
        self._waiting += np.ascontiguousarray(ids, dtype=self._dtype).data.cast("B")
        if len(self._waiting) >= BLOCK_BYTES:
            self._write_blocks(len(self._waiting) // BLOCK_BYTES * BLOCK_BYTES)
        self._lengths.append(ids.size)
        self._origins += np.zeros((), DOCUMENT).tobytes() if origin is None else origin.tobytes()
        self.tokens += ids.size
        self._text_bytes += text_bytes

    def _write_blocks(self, count: int) -> None:
        """Write the first ``count`` bytes that wait."""
        with memoryview(self._waiting) as waiting:
            for start in range(0, count, BLOCK_BYTES):
                block = waiting[start : min(start + BLOCK_BYTES, count)]
                self._digest.update(block)
                self._block_crc32.append(zlib.crc32(block))
                written = 0
                while written < len(block):  # an unbuffered write may take less than it was given
                    written += self._bin.write(block[written:])
                block.release()
        del self._waiting[:count]

    def close(self) -> ShardInfo:
        """Write the index, the origins and the sidecar, and rename all into place; a failure removes what was written.

        Raises:
            ValueError: no document was added.
        """
        try:
            return self._close()
        except BaseException:
            self.abort()
            raise

    def _close(self) -> ShardInfo:
        if not self._lengths:
            raise ValueError("a shard without documents")
        self._write_blocks(len(self._waiting))
        self._bin.close()
        index = index_bytes(np.frombuffer(self._lengths, dtype=np.int64), self._dtype)
        self._temporary["idx"].write_bytes(index)
        self._temporary["docs"].write_bytes(self._origins)
        for kind, path in self._temporary.items():
            publish(path, self._folder / f"{self._name}.{kind}")
        info = ShardInfo(
            name=self._name,
            documents=len(self._lengths),
            tokens=self.tokens,
            text_bytes=self._text_bytes,
            bin_bytes=self.tokens * self._dtype.itemsize,
            idx_bytes=len(index),
            docs_bytes=len(self._origins),
            bin_sha256=self._digest.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
            docs_sha256=hashlib.sha256(self._origins).hexdigest(),
        )
        write_atomically(self._folder / f"{self._name}.json", info.sidecar(self._block_crc32))
        return info

    def abort(self) -> None:
        """Remove what was written so far."""
        with contextlib.suppress(OSError):
            self._bin.close()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Place:
    """Part of a document in a range of tokens.

    Attributes:
        document: its number within the shard.
        begin: where the document begins, in tokens of the stream.
        offset: where in the document the part begins, in tokens.
        tokens: of the part.
    """

    shard: int
    document: int
    begin: int
    offset: int
    tokens: int


class TokenStream:
    """The tokens of a dataset folder, or of a Megatron pair ``PREFIX``, as one stream over all shards.

    Opening looks at names and sizes, never at tokens; shards are opened when first read. Copies and pickles re-open.

    Attributes:
        manifest: None for a dataset made by Megatron, as are then ``vocab_size`` and ``eos_id``.
        num_tokens: length of the stream.

    Raises:
        UserError: nothing there, unfinished, truncated, foreign or empty.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder) if (self.folder / MANIFEST).is_file() else None
        if self.manifest is None:
            self._shards = [_open_foreign(prefix) for prefix in foreign_prefixes(self.folder)]
        else:
            self._shards = [_open_own(self.folder, self.manifest, shard) for shard in self.manifest.shards]
        self._key = object()
        self._ends: Int64s = np.cumsum([shard.tokens for shard in self._shards], dtype=np.int64)
        self.num_tokens = int(self._ends[-1]) if self._shards else 0
        if self.num_tokens == 0:
            raise UserError(f"{self.folder} holds 0 tokens", "at least one", "prepare it from a source with text")

    def __reduce__(self) -> tuple[type[TokenStream], tuple[Path]]:
        return TokenStream, (self.folder,)

    @property
    def vocab_size(self) -> int | None:
        """Entries of the vocabulary: all ids are below it."""
        return self.manifest.vocab_size if self.manifest else None

    @property
    def eos_id(self) -> int | None:
        """The id that ends each document."""
        return self.manifest.eos_id if self.manifest else None

    @property
    def identity(self) -> str:
        """Names what is in it: tokens, order and origins; of a dataset made elsewhere only how much."""
        return self.manifest.sha256 if self.manifest else f"{self.num_tokens} tokens"

    @property
    def num_shards(self) -> int:
        return len(self._shards)

    def shard_name(self, shard: int) -> str:
        """The name of a shard's files, without their endings."""
        return self._shards[shard].prefix.name

    def read(self, start: int, count: int) -> Int64s:
        """Tokens [start, start + count) of the stream, across shard borders: int64 [count].

        Raises:
            IndexError: the range leaves the stream.
        """
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"tokens [{start}, {start + count}) of a stream of {self.num_tokens}")
        out = np.empty(count, dtype=np.int64)
        shard, filled = int(np.searchsorted(self._ends, start, side="right")), 0
        while filled < count:
            here = self._shards[shard]
            first = start + filled - (int(self._ends[shard]) - here.tokens)
            size = min(count - filled, here.tokens - first)
            width = here.dtype.itemsize
            data = _open_files().read(self._key, Path(f"{here.prefix}.bin"), first * width, size * width)
            out[filled : filled + size] = np.frombuffer(data, here.dtype)
            shard, filled = shard + 1, filled + size
        return out

    def documents(self, shard: int) -> Int64s:
        """Where the documents of one shard begin, in tokens from its start, its end last: int64 [documents + 1]."""
        prefix, tokens = self._shards[shard].prefix, self._shards[shard].tokens
        lengths, indices, *_ = read_index(prefix)
        bounds: Int64s = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])[indices]
        if bounds[0] != 0 or bounds[-1] != tokens or np.any(np.diff(bounds) < 0):
            expected = f"documents that take up 0..{tokens} tokens in order"
            raise UserError(f"{prefix}.idx: documents from {bounds[0]} to {bounds[-1]}", expected, PREP_AGAIN)
        return bounds

    def locate(self, start: int, count: int) -> list[Place]:
        """The documents in tokens [start, start + count) of the stream, in order."""
        places: list[Place] = []
        at, stop = start, min(start + count, self.num_tokens)
        while at < stop:
            shard = int(np.searchsorted(self._ends, at, side="right"))
            bounds = self.documents(shard) + (int(self._ends[shard]) - self._shards[shard].tokens)
            document = int(np.searchsorted(bounds, at, side="right")) - 1
            while at < stop and document + 1 < len(bounds):
                begin, end = int(bounds[document]), int(bounds[document + 1])
                if at < end:  # Megatron's may be empty
                    places.append(Place(shard, document, begin, at - begin, min(stop, end) - at))
                at, document = min(stop, end), document + 1
        return places

    def origin(self, shard: int, document: int) -> tuple[str, int] | None:
        """(source file, record in it counted from 0) of a document; None for a dataset made elsewhere."""
        if self.manifest is None:
            return None
        path = self._shards[shard].prefix.with_suffix(".docs")
        row = np.memmap(path, DOCUMENT, mode="r")[document]
        return self._source_files[int(row["file"])], int(row["record"])

    @cached_property
    def _source_files(self) -> list[str]:
        files: list[str] = json.loads((self.folder / SOURCES).read_bytes())
        return files

    def token_bytes(self) -> npt.NDArray[np.int32] | None:
        """UTF-8 bytes each token stands for, int32 [V], for bits per byte; None where no tokenizer folder is known."""
        path = self.folder / self.manifest.tokenizer / "token_bytes.npy" if self.manifest else None
        return np.load(path) if path and path.is_file() else None


@dataclass(frozen=True)
class _Shard:
    prefix: Path
    tokens: int
    dtype: np.dtype[Any]


@lru_cache(maxsize=1)
def _open_files() -> _OpenFiles:
    """Those of this process: one limit for all its streams."""
    return _OpenFiles()


class _OpenFiles:
    """Files kept open, the last used ones: a corpus has more shards than a process may have files.

    Read by position, not mapped: a window is a few KB anywhere in a terabyte, and a mapping would read ahead at each.
    """

    def __init__(self) -> None:
        self._files: OrderedDict[tuple[object, Path], FileIO] = OrderedDict()

    def read(self, key: object, path: Path, start: int, count: int) -> bytes:
        """Bytes [start, start + count) of a file.

        Args:
            key: of the stream: another one opens its files anew, as they may have been replaced since.

        Raises:
            UserError: it ends before.
        """
        if (key, path) not in self._files:
            self._files[key, path] = path.open("rb", buffering=0)
            if len(self._files) > _MAX_OPEN_FILES:
                self._files.popitem(last=False)[1].close()
        self._files.move_to_end((key, path))
        data = os.pread(self._files[key, path].fileno(), count, start)
        if len(data) < count:
            raise UserError(f"{path} ends at byte {start + len(data)}", f"{count} bytes from {start} on", PREP_AGAIN)
        return data


def _open_own(folder: Path, manifest: Manifest, shard: ShardInfo) -> _Shard:
    dtype = token_dtype(manifest.vocab_size)
    if shard.bin_bytes != shard.tokens * dtype.itemsize:
        found = f"{folder / MANIFEST}: {shard.name} of {shard.bin_bytes} bytes"
        raise UserError(found, f"{shard.tokens * dtype.itemsize} bytes for {shard.tokens} {dtype} ids", PREP_AGAIN)
    for kind, expected in (("bin", shard.bin_bytes), ("idx", shard.idx_bytes), ("docs", shard.docs_bytes)):
        path = folder / f"{shard.name}.{kind}"
        found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
        if found != f"{expected} bytes":
            raise UserError(f"{path}: {found}", f"{expected} bytes", PREP_AGAIN)
    return _Shard(folder / shard.name, shard.tokens, dtype)


def foreign_prefixes(path: Path) -> list[Path]:
    """The Megatron pairs that a user's path may mean: a folder of pairs, PREFIX, PREFIX.bin or PREFIX.idx."""
    remedy = "make it with `glam prep CONFIG`, or check the path"
    if path.is_dir():
        if inner := sorted(str(found.parent) for found in path.glob(f"*/*/{MANIFEST}")):
            raise UserError(f"{path} is a whole corpus", "one of its datasets", f"name one of: {', '.join(inner)}")
        bins = sorted(path.glob("*.bin"))
        if not bins or any(found.with_suffix(".json").is_file() for found in path.glob("shard-*.bin")):
            state = "is unfinished: it has shards but" if bins else "has"
            raise UserError(f"{path} {state} no {MANIFEST}", "a prepared dataset", remedy)
        return [found.with_suffix("") for found in bins]
    prefix = path.with_suffix("") if path.suffix in (".bin", ".idx") else path
    if not Path(f"{prefix}.bin").is_file():
        expected = f"a folder with {MANIFEST}, or PREFIX of PREFIX.bin and PREFIX.idx"
        raise UserError(f"{path}: no such dataset", expected, remedy)
    return [prefix]


def _open_foreign(prefix: Path) -> _Shard:
    lengths, _, dtype, _ = read_index(prefix)
    tokens, bin_bytes = int(lengths.sum(dtype=np.int64)), Path(f"{prefix}.bin").stat().st_size
    if tokens * dtype.itemsize != bin_bytes:
        expected = f"{tokens * dtype.itemsize} bytes, as its index says"
        raise UserError(f"{prefix}.bin: {bin_bytes} bytes", expected, "copy the pair again")
    return _Shard(prefix, tokens, dtype)
