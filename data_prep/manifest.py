"""What a dataset folder says of itself: `manifest.json`, written last, and the sidecar of each shard."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from configs.errors import UserError
from data_prep.storage import write_atomically

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
SOURCES = "sources.json"
BLOCK_BYTES = 1 << 20  # of a .bin file, with a checksum of its own, so that damage has a place
PREP_AGAIN = "delete the dataset and run `glam prep CONFIG` again, or copy it again from where it is whole"
# Beside each shard, a row a document: where it came from; `file` counts the lines of sources.json, both from 0.
DOCUMENT = np.dtype([("file", "<u4"), ("record", "<u8")])


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest type Megatron would choose for this vocabulary."""
    return np.dtype("<u2" if vocab_size < 65_500 else "<i4")


@dataclass(frozen=True)
class ShardInfo:
    """What the manifest says of one shard; ``text_bytes`` is the UTF-8 length of the text behind its tokens."""

    name: str
    documents: int
    tokens: int
    text_bytes: int
    bin_bytes: int
    idx_bytes: int
    docs_bytes: int
    bin_sha256: str
    idx_sha256: str
    docs_sha256: str

    def sidecar(self, block_crc32: Sequence[int]) -> bytes:
        """`shard-NNNNN.json`: the same, and a checksum for each BLOCK_BYTES of the tokens."""
        return json_bytes({**dataclasses.asdict(self), "bin_block_crc32": list(block_crc32)})


@dataclass(frozen=True)
class Manifest:
    """What a dataset folder holds.

    Attributes:
        name: of its source.
        weight: of the source in the mixture it was prepared for.
        records: what a document is in its source file: "file", "line" or "row".
        tokenizer: path of the tokenizer's folder, relative to the dataset's.
        configuration: fingerprint of the corpus.yaml that made it.
        sources_sha256: of sources.json, the list of source files.
        sha256: of all else that stands here.
    """

    format: int
    name: str
    weight: float
    records: str
    dtype: str
    vocab_size: int
    eos_id: int
    tokenizer_sha256: str
    tokenizer: str
    configuration: str
    sources_sha256: str
    shards: tuple[ShardInfo, ...]
    documents: int
    tokens: int
    text_bytes: int
    sha256: str = ""

    def own_sha256(self) -> str:
        """What `sha256` has to be."""
        return hashlib.sha256(json_bytes({**dataclasses.asdict(self), "sha256": ""})).hexdigest()


def write_manifest(
    folder: Path | str,
    *,
    name: str,
    vocab_size: int,
    eos_id: int,
    tokenizer_sha256: str,
    tokenizer: str,
    shards: Sequence[ShardInfo],
    weight: float = 1.0,
    records: str = "file",
    configuration: str = "",
    sources: Sequence[str] = (),
) -> Manifest:
    """Declare a dataset folder complete: to be called last.

    Args:
        sources: paths of the source files, which the shards' documents name by number.
    """
    listing = ("[\n" + ",\n".join(json.dumps(path) for path in sources) + "\n]\n").encode()
    write_atomically(Path(folder) / SOURCES, listing)
    manifest = Manifest(
        format=FORMAT_VERSION,
        name=name,
        weight=weight,
        records=records,
        dtype=token_dtype(vocab_size).name,
        vocab_size=vocab_size,
        eos_id=eos_id,
        tokenizer_sha256=tokenizer_sha256,
        tokenizer=tokenizer,
        configuration=configuration,
        sources_sha256=hashlib.sha256(listing).hexdigest(),
        shards=tuple(shards),
        documents=sum(shard.documents for shard in shards),
        tokens=sum(shard.tokens for shard in shards),
        text_bytes=sum(shard.text_bytes for shard in shards),
    )
    manifest = dataclasses.replace(manifest, sha256=manifest.own_sha256())
    write_atomically(Path(folder) / MANIFEST, json_bytes(dataclasses.asdict(manifest)))
    return manifest


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
        if manifest.sha256 != manifest.own_sha256():
            raise ValueError(f"sha256 {manifest.own_sha256()}, it says {manifest.sha256}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        found = f"{path}: {type(error).__name__}: {error}"
        raise UserError(found, "a manifest written by `glam prep`", PREP_AGAIN) from None
    return manifest


_Record = TypeVar("_Record", ShardInfo, Manifest)


def _checked(cls: type[_Record], tree: dict[str, Any]) -> _Record:
    for field in dataclasses.fields(cls):
        if field.type in ("int", "str") and type(tree[field.name]).__name__ != field.type:
            raise ValueError(f"{field.name} is {tree[field.name]!r}, expected {field.type}")
    return cls(**tree)


def json_bytes(tree: Any) -> bytes:
    """JSON as all files of a dataset are written."""
    return json.dumps(tree, indent=1).encode() + b"\n"
