"""What a run folder says of the run's life, to those who look from outside: the verdict, the watch, `glam status`.

DONE                      the last step is trained and saved
STOP                      the run is to save and end, and no job is to go on with it
ranks/rank-00003.json     what a rank last said of itself
starts/000001.json        each start of the run
restarts.jsonl            each decision whether a job that ended is queued again
checkpoints/step-…/       complete checkpoints
submits/0001/             each submit: code, configuration, script, log, job
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

DONE, STOP, RANKS, STARTS, RESTARTS, SUBMITS = "DONE", "STOP", "ranks", "starts", "restarts.jsonl", "submits"
JOB = "job.json"
LOG = "job.log"
RUNNING, STOPPED, FAILED = "running", "stopped", "failed"
_CHECKPOINT = re.compile(r"step-(\d{8})")
_START = re.compile(r"(\d{6})\.json")


@dataclass(frozen=True)
class RankStatus:
    """A rank's own word: `state` is running, done, stopped or failed."""

    rank: int
    state: str
    start: int | None = None
    host: str = ""
    pid: int | None = None
    step: int | None = None
    cause: str | None = None
    detail: str = ""
    time: float = 0.0
    beat: int = 0  # the file's time, in nanoseconds of whoever's clock: while the rank lives, it changes


@dataclass(frozen=True)
class Decision:
    """A line of restarts.jsonl. `counted`: a fault, which uses up the budget of restarts."""

    time: float
    job: str
    code: int
    cause: str
    reason: str
    step: int | None
    requeue: bool
    counted: bool


def is_there(run_dir: Path, name: str) -> bool:
    """Whether the run folder holds DONE or STOP. By listing: network file systems remember that a name was missing."""
    try:
        return name in os.listdir(run_dir)
    except OSError:
        return False


def newest_start(run_dir: Path) -> int:
    """Number of the newest start; 0 where there was none."""
    return max(start_numbers(run_dir), default=0)


def start_numbers(run_dir: Path) -> list[int]:
    return sorted(int(match[1]) for name in _names(run_dir / STARTS) if (match := _START.fullmatch(name)))


def read_start(run_dir: Path, number: int) -> dict[str, Any]:
    """The record of a start; empty where it cannot be read."""
    return read_object(run_dir / STARTS / f"{number:06d}.json")


def newest_checkpoint_step(run_dir: Path) -> int | None:
    found = (_CHECKPOINT.fullmatch(name) for name in _names(run_dir / "checkpoints"))
    return max((int(match[1]) for match in found if match), default=None)


def read_ranks(run_dir: Path, after: int = 0, since: float = 0.0) -> list[RankStatus]:
    """What the ranks of starts later than `after` said, in their order; files of older starts, of other shapes or
    half-written are passed over. A rank that failed before its start had a number counts from the time `since` on."""
    folder = run_dir / RANKS
    read = [_read_rank(folder / name) for name in _names(folder) if name.endswith(".json")]
    found = [s for s in read if s and (s.start > after if s.start else s.time >= since)]
    return sorted(found, key=lambda status: status.rank)


def _read_rank(path: Path) -> RankStatus | None:
    """Opened before its time is asked for: network file systems look again then, else they may remember an old one."""
    try:
        with path.open(encoding="utf-8") as file:
            tree, beat = json.loads(file.read()), os.fstat(file.fileno()).st_mtime_ns
    except (OSError, ValueError):
        return None
    status = as_status(tree) if isinstance(tree, dict) else None
    return replace(status, beat=beat) if status else None


def as_status(tree: dict[str, Any]) -> RankStatus | None:
    """A rank's record as a typed one; None where the least it must say is missing."""
    rank, state = tree.get("rank"), tree.get("state")
    if not isinstance(rank, int) or not isinstance(state, str):
        return None
    number: dict[str, Any] = {
        key: tree.get(key) if isinstance(tree.get(key), int) else None for key in ("start", "pid", "step")
    }
    cause, when = tree.get("cause"), tree.get("time")
    return RankStatus(
        rank,
        state,
        host=str(tree.get("host") or ""),
        cause=str(cause) if cause else None,
        detail=str(tree.get("detail") or ""),
        time=float(when) if isinstance(when, int | float) else 0.0,
        **number,
    )


def read_decisions(run_dir: Path) -> list[Decision]:
    """All decisions, oldest first; lines that are none, such as one a full disk cut short, are passed over."""
    try:
        lines = (run_dir / RESTARTS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    names, found = {field.name for field in fields(Decision)}, []
    for line in lines:
        with contextlib.suppress(ValueError, TypeError):
            tree = json.loads(line)
            if isinstance(tree, dict):
                found.append(Decision(**{key: value for key, value in tree.items() if key in names}))
    return found


def append_decision(run_dir: Path, decision: Decision) -> None:
    """One line, in one write, on the disk before this returns."""
    line = json.dumps(asdict(decision)) + "\n"
    number = os.open(run_dir / RESTARTS, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(number, line.encode())
        os.fsync(number)
    finally:
        os.close(number)


def submit_folders(run_dir: Path) -> list[Path]:
    """Oldest first."""
    folder = run_dir / SUBMITS
    return [folder / name for name in sorted(_names(folder)) if re.fullmatch(r"\d{4,}", name)]


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object; empty where the file is missing, half-written or something else."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []
