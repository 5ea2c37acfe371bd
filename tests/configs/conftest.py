"""A small valid run as a plain tree of YAML values, for tests that break one thing at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.base import set_dotted
from configs.run import RunConfig

TREE: dict[str, Any] = {
    "name": "small",
    "run_dir": "unused",
    "model": {
        "vocab_size": 64,
        "num_layers": 4,
        "width": 32,
        "attention": {"num_heads": 4, "head_width": 8},
        "ffn": {"width": 48},
        "moe": {"num_experts": 6, "expert": {"width": 40, "activation": "relu", "gated": False}},
    },
    "data": {"sources": [{"name": "web", "path": "unused"}, {"name": "books", "path": "unused", "weight": 2.5}]},
    "train": {
        "steps": 100,
        "sequence_length": 16,
        "batch_tokens": 128,
        "micro_batch_sequences": 2,
        "optimizer": {"peak_lr": 1e-2},
        "schedule": {"kind": "cosine", "warmup_steps": 10},
    },
}

Check = Callable[..., RunConfig]


@pytest.fixture
def tree() -> dict[str, Any]:
    return copy.deepcopy(TREE)


@pytest.fixture
def check(tree: dict[str, Any]) -> Check:
    """Validate the small run with dotted overrides."""

    def checked(*overrides: str) -> RunConfig:
        changed = copy.deepcopy(tree)
        for item in overrides:
            set_dotted(changed, item)
        return RunConfig.check(changed, where="test")

    return checked


@pytest.fixture
def file(tmp_path: Path, tree: dict[str, Any]) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
