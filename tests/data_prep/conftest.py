"""Small real corpora: slices of Python's own library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.corpus import CorpusConfig
from data_prep.pipeline import prepare
from data_prep.summary import PrepSummary

MakeConfig = Callable[..., CorpusConfig]


def stdlib_source(package: str, name: str | None = None) -> dict[str, Any]:
    """One package of the standard library as a source."""
    return {"kind": "text_tree", "name": name or package, "path": "{stdlib}/" + package, "pattern": "**/*.py"}


@pytest.fixture(scope="session")
def make_config() -> MakeConfig:
    """A configuration over the json and email packages, any key replaced."""

    def make(output: Path, **changes: Any) -> CorpusConfig:
        tree: dict[str, Any] = {
            "output": str(output),
            "sources": [stdlib_source("json"), stdlib_source("email")],
            "tokenizer": {"kind": "train_sentencepiece", "vocab_size": 512, "sample_bytes": 300_000},
            "deduplicate": {"near": None},
            "heldout_fraction": 0.2,
            "shard_tokens": 20_000,
            "workers": 1,
        }
        return CorpusConfig.check({**tree, **changes}, where="test")

    return make


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig) -> PrepSummary:
    """A corpus prepared once; tests that break something copy it."""
    return prepare(make_config(tmp_path_factory.mktemp("corpus") / "out"))
