"""Text and data sets for benchmarks.data_prep, and what it runs in processes of their own."""

from __future__ import annotations

import json
import re
import resource
import sys
import sysconfig
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from configs.corpus import CorpusConfig

DOCUMENT_CHARACTERS = 4_000
_SHARD_TOKENS = 100_000_000
_DOCUMENT_TOKENS = 1_000


def write_lines(path: Path, text_bytes: int, copies: int = 1, first: int = 0) -> Path:
    """Python's own library as JSON lines, `copies` times, each with other words, so that no copy is a duplicate.

    Args:
        first: number of the first copy; 0 is the text as it is.
    """
    if path.exists():
        return path
    root = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in root.glob("**/*.py") if "site-packages" not in p.parts)
    texts, held = [], 0
    for file in files:
        text = file.read_text(encoding="utf-8", errors="ignore")
        texts += [text[at : at + DOCUMENT_CHARACTERS] for at in range(0, len(text), DOCUMENT_CHARACTERS)]
        held += len(text)
        if held >= text_bytes:
            break
    with path.open("wb") as out:
        for copy in range(first, first + copies):
            for number, text in enumerate(texts):
                words = re.sub(r"\b([a-z]{4,})\b", rf"\1{chr(97 + copy) * 2}", text) if copy else text
                out.write(json.dumps({"id": number, "text": words}).encode() + b"\n")
    return path


def every_rule() -> list[dict[str, object]]:
    """Gopher's rules with thresholds that nothing breaks, so that each document pays for all of them."""
    from configs.filters import GopherQuality, GopherRepetition

    rules: list[dict[str, object]] = []
    for kind in (GopherQuality, GopherRepetition):
        names = [name for name in kind.model_fields if name.startswith(("min_", "max_"))]
        loose = {name: 0 if name[:3] == "min" else 1 if "fraction" in name else 10**9 for name in names}
        rules.append({"kind": kind.model_fields["kind"].default, **loose})
    return rules


def corpus_config(
    lines: Path, output: Path, algorithm: str, vocab_size: int, workers: int, curated: Path | None = None
) -> CorpusConfig:
    """A configuration over one file of lines; with a file of curated ones too it takes every stage."""
    tree: dict[str, Any] = {
        "output": str(output),
        "sources": [{"kind": "jsonl", "name": "lines", "path": str(lines)}],
        "tokenizer": {"kind": "train_sentencepiece", "algorithm": algorithm, "vocab_size": vocab_size,
                      "sample_bytes": min(12_000_000, lines.stat().st_size)},
        "heldout_fraction": 0.05,
        "workers": workers,
    }  # fmt: skip
    if curated is not None:
        tree["sources"].append({"kind": "jsonl", "name": "curated", "path": str(curated)})
        tree["clean"] = {"filters": every_rule()}
        sample = min(4_000_000, curated.stat().st_size // 4)
        tree["quality"] = {"kind": "train_classifier", "curated": ["curated"], "filter": ["lines"],
                           "sample_bytes": sample, "pareto_alpha": 0.01}  # fmt: skip
        tree["tokenizer"]["sample_bytes"] = sample
    else:
        tree["deduplicate"] = {"exact": False, "near": None}
    from configs.corpus import CorpusConfig

    return CorpusConfig.check(tree, "benchmark")


def write_sparse(folder: Path, tokens: int) -> Path:
    """A data set of so many tokens, all of them 0: its .bin files take no room."""
    from data_prep.manifest import DOCUMENT, ShardInfo, token_dtype, write_manifest
    from data_prep.megatron_index import index_bytes

    folder.mkdir()
    dtype, shards = token_dtype(32_000), []
    for number in range(-(-tokens // _SHARD_TOKENS)):
        count = min(_SHARD_TOKENS, tokens - number * _SHARD_TOKENS) // _DOCUMENT_TOKENS
        prefix, size = folder / f"shard-{number:05d}", count * _DOCUMENT_TOKENS * dtype.itemsize
        with Path(f"{prefix}.bin").open("wb") as file:
            file.truncate(size)
        index = index_bytes(np.full(count, _DOCUMENT_TOKENS, np.int64), dtype)
        Path(f"{prefix}.idx").write_bytes(index)
        np.zeros(count, DOCUMENT).tofile(f"{prefix}.docs")
        sizes = (size, len(index), count * DOCUMENT.itemsize)
        shards.append(ShardInfo(prefix.name, count, count * _DOCUMENT_TOKENS, 0, *sizes, "", "", ""))
    write_manifest(folder, name="sparse", vocab_size=32_000, eos_id=1, tokenizer_sha256="", tokenizer=".",
                   shards=shards, sources=["nowhere"])  # fmt: skip
    return folder


def prepare_once(lines: str, curated: str, output: str, vocab_size: str, workers: str) -> dict[str, object]:
    """A whole preparation: seconds of each stage, and the resident memory of the fullest worker."""
    from data_prep.pipeline import prepare

    summary = prepare(corpus_config(Path(lines), Path(output), "unigram", int(vocab_size), int(workers), Path(curated)))
    assert summary is not None
    read = sum(source.stages["read"]["bytes"] for source in summary.sources)
    who = resource.RUSAGE_SELF if workers == "1" else resource.RUSAGE_CHILDREN
    return {
        "text_bytes": read,
        "seconds": summary.seconds,
        "peak_bytes": resource.getrusage(who).ru_maxrss * 1024,
    }


def first_batch(dataset: str) -> dict[str, float]:
    """Seconds from a data section to the tokens of the first batch."""
    began = time.perf_counter()
    from configs.data import DataConfig, DataSource
    from pretrain.data import Sampler

    imported = time.perf_counter()
    sampler = Sampler(DataConfig(sources=(DataSource(name="sparse", path=dataset),)), 1024)
    windows = sampler.read(sampler.next_batch(512))
    assert windows.shape == (512, 1025)
    return {"imports": imported - began, "seconds": time.perf_counter() - imported}


if __name__ == "__main__":
    task = {"prepare": prepare_once, "start": first_batch}[sys.argv[1]]
    print(json.dumps(task(*sys.argv[2:])))
