"""All that a resume needs besides tensors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from pretrain.blocklist import Blocked, from_json
from pretrain.data import Cursor
from pretrain.health import BadStep, History


@dataclass
class TrainState:
    """Written into each checkpoint as JSON. Nothing outside this, the tensors and the configuration is remembered."""

    step: int = 0  # steps begun and ended, skipped ones included
    updates: int = 0  # steps that changed the weights
    tokens: int = 0  # tokens seen
    skipped: list[int] = field(default_factory=list)  # steps judged unfit
    seconds: float = 0.0  # in steps, over all starts
    cursor: Cursor = field(default_factory=Cursor)
    history: History = field(default_factory=History)  # what the next steps are judged by
    row: list[BadStep] = field(default_factory=list)  # unfit steps since the last one that was applied
    blocklist: list[Blocked] = field(default_factory=list)

    @property
    def last_fit_step(self) -> int:
        """Where a rollback would have to go to, or before: behind it lie only steps of an unbroken bad row."""
        return self.row[0].step - 1 if self.row else self.step

    @property
    def rollbacks(self) -> int:
        """How often the run has gone back so far."""
        return max((one.rollback for one in self.blocklist), default=0)

    def become(self, other: TrainState) -> None:
        """Take over another's values; whoever holds this state sees them."""
        vars(self).update(vars(other))

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> TrainState:
        """What a checkpoint from before there was a history lacks begins empty."""
        row = [BadStep(**{**bad, "samples": tuple(from_json(bad["samples"]))}) for bad in tree.get("row", [])]
        inner = {
            "cursor": Cursor(**tree["cursor"]),
            "history": History(**tree.get("history", {})),
            "row": row,
            "blocklist": from_json(tree.get("blocklist", [])),
        }
        return cls(**{**tree, **inner})
