"""Shared by all tests: one thread a process, and two small sources of real text, prepared once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.corpus import CorpusConfig
from configs.data import DataConfig

# Before torch: every rank and every thread pool of a test run shares two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

MakeData = Callable[..., DataConfig]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus of the json and email packages: about 26,000 and 81,000 training tokens of 512 kinds."""
    from data_prep.pipeline import prepare  # numpy, which reads the variable above once

    output = tmp_path_factory.mktemp("corpus") / "out"
    tree = {
        "output": str(output),
        "sources": [
            {"kind": "text_tree", "name": name, "path": "{stdlib}/" + name, "pattern": "**/*.py"}
            for name in ("json", "email")
        ],
        "tokenizer": {"kind": "train_sentencepiece", "vocab_size": 512, "sample_bytes": 100_000},
        "heldout_fraction": 0.2,
        "shard_tokens": 20_000,
        "workers": 1,
    }
    prepare(CorpusConfig.check(tree, where="test"))
    return output


@pytest.fixture(scope="session")
def make_data(corpus: Path) -> MakeData:
    """A data section: names to weights. A name may be anything; it reads `json` or, where it says so, `email`."""

    def make(seed: int = 0, **weights: float) -> DataConfig:
        paths = {name: corpus / "train" / ("email" if "email" in name else "json") for name in weights}
        sources = [{"name": name, "path": str(paths[name]), "weight": weight} for name, weight in weights.items()]
        heldout = sorted(str(path) for path in (corpus / "heldout").iterdir())
        return DataConfig.check({"sources": sources, "heldout": heldout, "seed": seed}, where="test")

    return make
