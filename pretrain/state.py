"""All that a resume needs besides tensors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from pretrain.data import Cursor


@dataclass
class TrainState:
    """Written into each checkpoint as JSON. Nothing outside this, the tensors and the configuration is remembered."""

    step: int = 0  # steps begun and ended, skipped ones included
    updates: int = 0  # steps that changed the weights
    tokens: int = 0  # tokens seen
    skipped: list[int] = field(default_factory=list)  # steps judged unfit
    seconds: float = 0.0  # in steps, over all starts
    cursor: Cursor = field(default_factory=Cursor)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> TrainState:
        return cls(**{**tree, "cursor": Cursor(**tree["cursor"])})
