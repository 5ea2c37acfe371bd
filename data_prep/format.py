"""The on-disk format of tokens: writer and reader side by side.

A dataset is a folder of shards. A shard is a pair in Megatron's indexed format, a sequence a document, EOS at its end:
  shard-00000.bin   token ids, little-endian, uint16 below 65,500 vocabulary entries, else int32
  shard-00000.idx   where each document lies (data_prep.megatron_index)
  shard-00000.json  its counts, sizes in bytes and checksums
and `manifest.json`, written last: a folder with a manifest is complete. Pairs made by Megatron are read without.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from array import array
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from configs.errors import UserError
from data_prep.megatron_index import Int64s, index_bytes, read_index
from data_prep.storage import publish, sha256_file, write_atomically

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PREP_AGAIN = "delete the dataset and run `glam prep CONFIG` again, or copy it again from where it is whole"

Ids = npt.NDArray[np.integer[Any]]


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest type Megatron would choose for this vocabulary."""
    return np.dtype("<u2" if vocab_size < 65_500 else "<i4")


@dataclass(frozen=True)
class ShardInfo:
    """What the sidecar says of one shard; ``text_bytes`` is the UTF-8 length of the text behind its tokens."""

    name: str
    documents: int
    tokens: int
    text_bytes: int
    bin_bytes: int
    idx_bytes: int
    bin_sha256: str
    idx_sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a dataset folder holds. ``tokenizer`` is the path of the tokenizer's folder, relative to the dataset's."""

    format: int
    name: str
    dtype: str
    vocab_size: int
    eos_id: int
    tokenizer_sha256: str
    tokenizer: str
    shards: tuple[ShardInfo, ...]
    documents: int
    tokens: int
    text_bytes: int


class ShardWriter:
    """Writes one shard under temporary names; `close` gives it its names, an error in its context removes it."""

    def __init__(self, folder: Path | str, index: int, vocab_size: int) -> None:
        self._folder, self._name = Path(folder), f"shard-{index:05d}"
        self._vocab_size, self._dtype = vocab_size, token_dtype(vocab_size)
        self._lengths = array("q")
        self._text_bytes = 0
        self._digest = hashlib.sha256()
        self._temporary = {kind: self._folder / f"{self._name}.{kind}.tmp" for kind in ("bin", "idx")}
        self._bin = self._temporary["bin"].open("wb", buffering=1 << 20)
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

    def add_document(self, ids: Ids, text_bytes: int) -> None:
        """Append one document: ids [tokens], EOS included.

        Raises:
            ValueError: no ids, or an id outside the vocabulary; nothing was written.
        """
        if ids.ndim != 1 or ids.size == 0:
            raise ValueError(f"a document of shape {ids.shape}; expected [tokens] with at least the EOS id")
        if int(ids.min()) < 0 or int(ids.max()) >= self._vocab_size:
            raise ValueError(f"token ids {ids.min()}..{ids.max()} outside the vocabulary of {self._vocab_size}")
        data = np.ascontiguousarray(ids, dtype=self._dtype).data.cast("B")
        self._bin.write(data)
        self._digest.update(data)
        self._lengths.append(ids.size)
        self.tokens += ids.size
        self._text_bytes += text_bytes

    def close(self) -> ShardInfo:
        """Write the index and the sidecar and rename all three into place; a failure removes what was written.

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
        self._bin.close()
        index = index_bytes(np.frombuffer(self._lengths, dtype=np.int64), self._dtype)
        self._temporary["idx"].write_bytes(index)
        for kind, path in self._temporary.items():
            publish(path, self._folder / f"{self._name}.{kind}")
        info = ShardInfo(
            name=self._name,
            documents=len(self._lengths),
            tokens=self.tokens,
            text_bytes=self._text_bytes,
            bin_bytes=self.tokens * self._dtype.itemsize,
            idx_bytes=len(index),
            bin_sha256=self._digest.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
        )
        sidecar = {key: value for key, value in dataclasses.asdict(info).items() if key != "name"}
        write_atomically(self._folder / f"{self._name}.json", _json_bytes(sidecar))
        return info

    def abort(self) -> None:
        """Remove what was written so far."""
        with contextlib.suppress(OSError):  # closing flushes, which a full disk refuses once more
            self._bin.close()
        for path in self._temporary.values():
            path.unlink(missing_ok=True)


def write_manifest(
    folder: Path | str,
    *,
    name: str,
    vocab_size: int,
    eos_id: int,
    tokenizer_sha256: str,
    tokenizer: str,
    shards: list[ShardInfo],
) -> Manifest:
    """Declare a dataset folder complete: to be called last."""
    manifest = Manifest(
        format=FORMAT_VERSION,
        name=name,
        dtype=token_dtype(vocab_size).name,
        vocab_size=vocab_size,
        eos_id=eos_id,
        tokenizer_sha256=tokenizer_sha256,
        tokenizer=tokenizer,
        shards=tuple(shards),
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        text_bytes=sum(shard.text_bytes for shard in shards),
    )
    write_atomically(Path(folder) / MANIFEST, _json_bytes(dataclasses.asdict(manifest)))
    return manifest


class TokenStream:
    """The tokens of a dataset folder, or of a Megatron pair ``PREFIX``, as one stream over all shards.

    Opening looks at names and sizes, never at tokens; shards are mapped when first read. Copies and pickles re-open.

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
            self._shards = [_open_foreign(prefix) for prefix in _foreign_prefixes(self.folder)]
        else:
            self._shards = [_open_own(self.folder, self.manifest, shard) for shard in self.manifest.shards]
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
    def num_shards(self) -> int:
        return len(self._shards)

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
            first = start + filled - (int(self._ends[shard]) - self._shards[shard].tokens)
            piece = self._shards[shard].ids[first : first + count - filled]
            out[filled : filled + piece.size] = piece
            shard, filled = shard + 1, filled + piece.size
        return out

    def documents(self, shard: int) -> Int64s:
        """Where the documents of one shard begin, in tokens from its start, its end last: int64 [documents + 1]."""
        lengths, indices, _ = read_index(self._shards[shard].prefix)
        return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])[indices]

    def token_bytes(self) -> npt.NDArray[np.int32] | None:
        """UTF-8 bytes each token stands for, int32 [V], for bits per byte; None where no tokenizer folder is known."""
        path = self.folder / self.manifest.tokenizer / "token_bytes.npy" if self.manifest else None
        return np.load(path) if path and path.is_file() else None


def verify(folder: Path | str) -> Manifest:
    """Read every byte of a dataset and compare checksums.

    Raises:
        UserError: names the first file that differs, with both checksums.
    """
    stream = TokenStream(folder)
    if stream.manifest is None:
        raise UserError(f"{folder} has no {MANIFEST}", "checksums", "only what `glam prep` made can be verified")
    for number, shard in enumerate(stream.manifest.shards):
        for kind, expected in (("bin", shard.bin_sha256), ("idx", shard.idx_sha256)):
            _compare(stream.folder / f"{shard.name}.{kind}", expected)
        documents = stream.documents(number).size - 1
        if documents != shard.documents:
            raise UserError(f"{shard.name}.idx: {documents} documents", f"{shard.documents}", PREP_AGAIN)
    model = stream.folder / stream.manifest.tokenizer / "tokenizer.model"
    if model.is_file():
        _compare(model, stream.manifest.tokenizer_sha256)
    return stream.manifest


def read_manifest(folder: Path | str) -> Manifest:
    """Read and check ``manifest.json``.

    Raises:
        UserError: unreadable, not ours, of another version, or at odds with itself.
    """
    path = Path(folder) / MANIFEST
    try:
        tree = json.loads(path.read_bytes())
        if tree["format"] != FORMAT_VERSION:
            raise ValueError(f"format {tree['format']!r}, this program reads {FORMAT_VERSION}")
        shards = tuple(_checked(ShardInfo, shard) for shard in tree["shards"])
        manifest = _checked(Manifest, {**tree, "shards": shards})
        if manifest.dtype != token_dtype(manifest.vocab_size).name:
            raise ValueError(f"dtype {manifest.dtype} does not go with a vocabulary of {manifest.vocab_size}")
        if manifest.tokens != sum(shard.tokens for shard in shards):
            raise ValueError(f"{manifest.tokens} tokens in all, {sum(shard.tokens for shard in shards)} in the shards")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        found = f"{path}: {type(error).__name__}: {error}"
        raise UserError(found, "a manifest written by `glam prep`", PREP_AGAIN) from None
    return manifest


@dataclass(frozen=True)
class _Shard:
    prefix: Path
    tokens: int
    dtype: np.dtype[Any]

    @cached_property
    def ids(self) -> Ids:
        # A plain view: slicing numpy.memmap objects is several times slower than slicing arrays.
        return np.memmap(f"{self.prefix}.bin", dtype=self.dtype, mode="r").view(np.ndarray)


_Record = TypeVar("_Record", ShardInfo, Manifest)


def _checked(cls: type[_Record], tree: dict[str, Any]) -> _Record:
    for field in dataclasses.fields(cls):
        if field.type in ("int", "str") and type(tree[field.name]).__name__ != field.type:
            raise ValueError(f"{field.name} is {tree[field.name]!r}, expected {field.type}")
    return cls(**tree)


def _open_own(folder: Path, manifest: Manifest, shard: ShardInfo) -> _Shard:
    dtype = token_dtype(manifest.vocab_size)
    if shard.bin_bytes != shard.tokens * dtype.itemsize:
        found = f"{folder / MANIFEST}: {shard.name} of {shard.bin_bytes} bytes"
        raise UserError(found, f"{shard.tokens * dtype.itemsize} bytes for {shard.tokens} {dtype} ids", PREP_AGAIN)
    for kind, expected in (("bin", shard.bin_bytes), ("idx", shard.idx_bytes)):
        path = folder / f"{shard.name}.{kind}"
        found = f"{path.stat().st_size} bytes" if path.is_file() else "no such file"
        if found != f"{expected} bytes":
            raise UserError(f"{path}: {found}", f"{expected} bytes", PREP_AGAIN)
    return _Shard(folder / shard.name, shard.tokens, dtype)


def _foreign_prefixes(path: Path) -> list[Path]:
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
    lengths, _, dtype = read_index(prefix)
    tokens, bin_bytes = int(lengths.sum(dtype=np.int64)), Path(f"{prefix}.bin").stat().st_size
    if tokens * dtype.itemsize != bin_bytes:
        expected = f"{tokens * dtype.itemsize} bytes, as its index says"
        raise UserError(f"{prefix}.bin: {bin_bytes} bytes", expected, "copy the pair again")
    return _Shard(prefix, tokens, dtype)


def _compare(path: Path, expected: str) -> None:
    found = sha256_file(path)
    if found != expected:
        raise UserError(f"{path}: sha256 {found}", f"sha256 {expected}", PREP_AGAIN)


def _json_bytes(tree: dict[str, Any]) -> bytes:
    return json.dumps(tree, indent=1).encode() + b"\n"
