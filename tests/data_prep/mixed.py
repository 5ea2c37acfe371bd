"""A corpus that takes every stage: archives, lines and a table, duplicates across them, rules, a quality filter."""

from __future__ import annotations

import gzip
import hashlib
import json
import sysconfig
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from configs.corpus import CorpusConfig

PIECE = 700  # characters of a document


def pieces(package: str) -> list[str]:
    """A package of the standard library in small documents."""
    files = sorted((Path(sysconfig.get_path("stdlib")) / package).glob("**/*.py"))
    texts = (path.read_text(encoding="utf-8", errors="ignore") for path in files)
    return [text[at : at + PIECE] for text in texts for at in range(0, len(text), PIECE)]


def lines(texts: list[str]) -> bytes:
    return b"".join(json.dumps({"id": n, "text": text}).encode() + b"\n" for n, text in enumerate(texts))


def mixed_sources(folder: Path) -> list[dict[str, Any]]:
    """Files of three sources, and their section of a configuration."""
    web, books = pieces("email"), pieces("json") + pieces("logging")
    folder.mkdir(parents=True, exist_ok=True)
    with pyarrow.output_stream(str(folder / "web-0.jsonl.zst"), compression="zstd") as file:
        file.write(lines(web[:250] + books[:20]))
    (folder / "web-1.jsonl.gz").write_bytes(gzip.compress(lines(web[200:500]), mtime=0))
    (folder / "books.jsonl").write_bytes(lines(books) + b"garbage\n\n" + lines(["", "short"]))
    table = pyarrow.table({"body": [text.replace("self", "this") for text in web[300:420]] + [None]})
    pyarrow.parquet.write_table(table, folder / "table.parquet", row_group_size=16)
    return [
        {"kind": "jsonl", "name": "web", "path": str(folder / "web-*"), "weight": 3},
        {"kind": "jsonl", "name": "books", "path": str(folder / "books.jsonl")},
        {"kind": "parquet", "name": "table", "path": str(folder / "table.parquet"), "text_field": "body"},
    ]


def mixed_config(folder: Path, output: Path, **changes: Any) -> CorpusConfig:
    """All stages over the files in ``folder``, which are made if they are not there."""
    if not (folder / "books.jsonl").exists():
        mixed_sources(folder)
    tree: dict[str, Any] = {
        "output": str(output),
        "sources": [
            {"kind": "jsonl", "name": "web", "path": str(folder / "web-*"), "weight": 3},
            {"kind": "jsonl", "name": "books", "path": str(folder / "books.jsonl")},
            {"kind": "parquet", "name": "table", "path": str(folder / "table.parquet"), "text_field": "body"},
        ],
        "clean": {"filters": [{"kind": "length", "min_words": 10}]},
        "quality": {"kind": "train_classifier", "curated": ["books"], "filter": ["web"], "sample_bytes": 100_000,
                    "features": 4096},
        "tokenizer": {"kind": "train_sentencepiece", "vocab_size": 400, "sample_bytes": 60_000},
        "heldout_fraction": 0.1,
        "shard_tokens": 20_000,
        "workers": 1,
        "unit_bytes": 40_000,
    }  # fmt: skip
    return CorpusConfig.check({**tree, **changes}, where="test")


def tree_hashes(output: Path) -> dict[str, str]:
    """SHA-256 of every file of a corpus but its configuration, which names the output and the workers."""
    files = sorted(path for path in output.rglob("*") if path.is_file())
    names = {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return {name: found for name, found in names.items() if name not in ("corpus.yaml", "data.yaml")}
