"""How a run fares, from its folder: for `glam status`, and for `glam submit` to know whether it lives."""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from configs.errors import UserError
from configs.run import RunConfig
from pretrain.checkpoint_folders import complete_checkpoints, step_of
from pretrain.goodput import Ledger, ledger
from slurm import run_folder
from slurm.run_folder import FAILED, RUNNING, Decision, RankStatus
from slurm.submit import Job

_TAIL_BYTES = 2**20  # of metrics.jsonl: the newest records; the whole of a long run is gigabytes
_FRESH_S = 120.0  # a run whose records are younger is taken to live, if its process is elsewhere


@dataclass(frozen=True)
class RunStatus:
    run_dir: Path
    name: str | None
    marker: str | None  # DONE or STOP
    step: int | None  # the last one on record
    steps: int | None
    checkpoint: Path | None
    starts: tuple[dict[str, Any], ...]  # newest last
    ranks: tuple[RankStatus, ...]  # of the newest start
    decisions: tuple[Decision, ...]
    log: Path | None  # of the newest submit
    ledger: Ledger | None
    jobs: tuple[Job, ...] = ()
    slurm_silent: str | None = None  # why nothing is known of jobs

    @property
    def failure(self) -> dict[str, Any] | None:
        """The last one: cause, detail, time."""
        told = [r for r in self.ranks if r.state == FAILED and r.cause]
        counted = [decision for decision in self.decisions if decision.counted]
        if told and (not counted or told[0].time > counted[-1].time):
            first = min(told, key=lambda rank: rank.time)
            return {"cause": first.cause, "detail": first.detail, "time": first.time, "rank": first.rank,
                    "host": first.host}  # fmt: skip
        return {k: getattr(counted[-1], n) for k, n in _OF_DECISION.items()} if counted else None


_OF_DECISION = {"cause": "cause", "detail": "reason", "time": "time"}


def look_at(run_dir: Path) -> RunStatus:
    """All but what SLURM knows."""
    numbers = run_folder.start_numbers(run_dir)
    records, checkpoints = tail_records(run_dir), complete_checkpoints(run_dir)
    submits = run_folder.submit_folders(run_dir)
    configs = [folder / "config.yaml" for folder in reversed(submits)] + [run_dir / "config.yaml"]
    name, steps = None, None
    for path in configs:
        try:
            config = RunConfig.load(path)
            name, steps = config.name, config.train.steps
            break
        except UserError:  # missing, or of another version
            continue
    reached = [record["step"] for record in records if isinstance(record.get("step"), int)]
    reached += [step_of(folder) for folder in checkpoints[-1:]]
    return RunStatus(
        run_dir=run_dir,
        name=name,
        marker=next((m for m in (run_folder.DONE, run_folder.STOP) if run_folder.is_there(run_dir, m)), None),
        step=max(reached, default=None),
        steps=steps,
        checkpoint=checkpoints[-1] if checkpoints else None,
        starts=tuple({"start": number, **run_folder.read_start(run_dir, number)} for number in numbers),
        ranks=tuple(run_folder.read_ranks(run_dir, after=numbers[-1] - 1)) if numbers else (),
        decisions=tuple(run_folder.read_decisions(run_dir)),
        log=submits[-1] / run_folder.LOG if submits else None,
        ledger=ledger(run_dir),
    )


def tail_records(run_dir: Path) -> list[dict[str, Any]]:
    """The newest records of metrics.jsonl, whole ones."""
    try:
        with (run_dir / "metrics.jsonl").open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def save_seconds(run_dir: Path) -> float | None:
    """What the longest of the last saves took; None where none is on record."""
    saves = [record for record in tail_records(run_dir) if record.get("event") == "saved"]
    return max((float(record["seconds"]) for record in saves[-10:]), default=None)


def live_start(run_dir: Path) -> str | None:
    """The newest start, in words, if its process is there, or, on another machine, seems to be."""
    number = run_folder.newest_start(run_dir)
    facts = run_folder.read_start(run_dir, number)
    host, pid, began = facts.get("host"), facts.get("pid"), facts.get("time")
    if not isinstance(pid, int) or not isinstance(began, int | float):
        return None
    who = f"process {pid} on {host} (start {number})"
    if host == socket.gethostname():
        try:  # another process may bear the number by now
            return who if psutil.Process(pid).create_time() <= began + 1 else None
        except psutil.Error:
            return None
    if any(decision.time > began for decision in run_folder.read_decisions(run_dir)):
        return None  # its job has ended, whatever its ranks last said
    states = {rank.state for rank in run_folder.read_ranks(run_dir, after=number - 1)}
    try:
        age = time.time() - (run_dir / "metrics.jsonl").stat().st_mtime
    except OSError:
        return None
    return f"{who}, which wrote {age:.0f} s ago" if states == {RUNNING} and age < _FRESH_S else None


def as_json(status: RunStatus) -> dict[str, Any]:
    return {
        "run": str(status.run_dir),
        "name": status.name,
        "done": status.marker == run_folder.DONE,
        "stop": status.marker == run_folder.STOP,
        "jobs": [asdict(job) for job in status.jobs],
        "slurm": status.slurm_silent,
        "step": status.step,
        "steps": status.steps,
        "checkpoint": str(status.checkpoint) if status.checkpoint else None,
        "checkpoint_step": step_of(status.checkpoint) if status.checkpoint else None,
        "starts": list(status.starts),
        "ranks": dict(Counter(rank.state for rank in status.ranks)),
        "last_failure": status.failure,
        "decisions": [asdict(decision) for decision in status.decisions],
        "log": str(status.log) if status.log else None,
        "goodput": status.ledger.as_json() if status.ledger else None,
    }


def show(status: RunStatus) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = 160
    table = Table(title=f"{status.name or 'run'} in {status.run_dir}", show_header=False, title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in rows(status):
        table.add_row(key, _plain(value))
    console.print(table)


def rows(status: RunStatus) -> list[tuple[str, str]]:
    found = [("state", _state(status))]
    found += [("job", f"{job.id} {job.state} ({job.reason})") for job in status.jobs]
    if status.slurm_silent:
        found.append(("job", f"unknown: {status.slurm_silent}"))
    found.append(("step", f"{status.step or 0} of {status.steps if status.steps is not None else '?'}"))
    found.append(("newest checkpoint", str(status.checkpoint or "none yet")))
    if status.starts:
        last = status.starts[-1]
        where = f"{last.get('ranks', '?')} rank(s), rank 0 on {last.get('host', '?')}"
        found.append(("starts", f"{len(status.starts)}, the last {_ago(last.get('time'))} with {where}"))
    if failure := status.failure:
        found.append(("last failure", f"{_ago(failure['time'])}: {failure['cause']}: {failure['detail']}"))
    for decision in status.decisions[-5:]:
        verb = "queued again" if decision.requeue else "ended"
        found.append(("decision", f"{_ago(decision.time)}, job {decision.job}: {verb}: {decision.reason}"))
    if status.ledger:
        parts = {k: v for k, v in status.ledger.as_json().items() if k not in ("goodput", "total")}
        shares = ", ".join(f"{name} {seconds:,.0f} s" for name, seconds in parts.items())
        found.append(("goodput", f"{status.ledger.goodput:.1%} of {status.ledger.total:,.0f} s ({shares})"))
    if status.log:
        found.append(("log", str(status.log)))
    return found


def _state(status: RunStatus) -> str:
    if status.marker == run_folder.DONE:
        return "done"
    counts = Counter(rank.state for rank in status.ranks)
    told = ", ".join(f"{number} {state}" for state, number in counts.items())
    asked = "asked to stop; " if status.marker == run_folder.STOP else ""
    return asked + (
        f"ranks of the newest start, as they last said: {told}" if told else "no rank has said anything yet"
    )


def _ago(when: Any) -> str:
    if not isinstance(when, int | float):
        return "at an unknown time"
    return f"{time.strftime('%F %T', time.localtime(when))}"


def _plain(text: str) -> str:
    """Brackets in it are no markup."""
    return text.replace("[", r"\[")
