"""Where the time of a run went, over all its starts: RUN/ledger.jsonl, and its sums.

metrics.jsonl forgets what was lost (a resumed run drops what lies beyond its checkpoint); the ledger only grows. Each
line has a time, the start of the run that wrote it, and the seconds that steps have taken so far. Those are part of the
checkpointed state: where they fall back from one line to the next, work was lost.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import psutil

LEDGER = "ledger.jsonl"


class LedgerFile:
    """Appends; on rank 0."""

    def __init__(self, run_dir: Path, start: int) -> None:
        self._file = (run_dir / LEDGER).open("a", encoding="utf-8")
        self._start = start
        self._line(kind="begun", time=psutil.Process().create_time())

    def note(self, kind: str, figures: dict[str, Any]) -> None:
        """A record of metrics.jsonl."""
        event = figures.get("event", kind)
        wanted = {"train": "step_seconds", "started": "step_seconds", "rolled_back": "step_seconds"}
        parts = {"saved": "stall_s", "eval": "seconds"}
        if event in wanted and wanted[event] in figures:
            self._line(kind=event, time=time.time(), step_seconds=figures[wanted[event]])
        elif event in parts and parts[event] in figures:
            self._line(kind=event, time=time.time(), seconds=figures[parts[event]])

    def close(self, step_seconds: float | None = None) -> None:
        if step_seconds is not None:
            self._line(kind="ended", time=time.time(), step_seconds=step_seconds)
        self._file.close()

    def _line(self, **facts: Any) -> None:
        self._file.write(json.dumps({"start": self._start, **facts}) + "\n")
        self._file.flush()


@dataclass(frozen=True)
class Ledger:
    """Seconds of wall time from the first start to the last line.

    Attributes:
        steps: in steps that count.
        lost: in steps that were made and had to be made again.
        saves: that training stood still for checkpoints.
        evals: in evaluations.
        starts: from the beginning of a process to its first step.
        waiting: between the end of one start and the beginning of the next.
        other: what is left: logging, reading data, what was not yet on record when a start ended.
    """

    steps: float
    lost: float
    saves: float
    evals: float
    starts: float
    waiting: float
    other: float

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def goodput(self) -> float:
        """Share of the time that went into steps that count."""
        return self.steps / self.total if self.total > 0 else 0.0

    def as_json(self) -> dict[str, float]:
        return {**asdict(self), "total": self.total, "goodput": self.goodput}


def ledger(run_dir: Path) -> Ledger | None:
    """The sums; None where the run has no ledger. A line cut off by a crash is passed over."""
    lines = _read(run_dir / LEDGER)
    if not lines:
        return None
    sums = {"saves": 0.0, "evals": 0.0, "starts": 0.0, "waiting": 0.0, "lost": 0.0}
    kept, begun, last = 0.0, lines[0]["time"], lines[0]["time"]
    for line in lines:
        if line["kind"] == "begun":
            sums["waiting"] += max(0.0, line["time"] - last)
            begun = line["time"]
        elif line["kind"] == "started":
            sums["starts"] += max(0.0, line["time"] - begun)
        elif line["kind"] == "saved":
            sums["saves"] += line["seconds"]
        elif line["kind"] == "eval":
            sums["evals"] += line["seconds"]
        if "step_seconds" in line:
            sums["lost"] += max(0.0, kept - line["step_seconds"])
            kept = line["step_seconds"]
        last = max(last, line["time"])
    total = last - lines[0]["time"]
    other = max(0.0, total - kept - sum(sums.values()))
    return Ledger(steps=kept, other=other, **sums)


def _read(path: Path) -> list[dict[str, Any]]:
    found = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found
