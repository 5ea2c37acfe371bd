"""What is seen of a fault from outside, in the run's folder and in the job's log: its moments, and a row of them."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import report
from pretrain.goodput import LEDGER
from pretrain.metrics_file import read_metrics
from slurm.run_folder import RUNNING, Decision, read_decisions, read_ranks, start_numbers
from tests.slurm_cluster.cluster import Slurm
from tests.slurm_cluster.tiny_run import Submitted


@dataclass(frozen=True)
class Site:
    """A run under way."""

    submitted: Submitted
    launched: bool = False  # by torchrun

    @property
    def slurm(self) -> Slurm:
        return self.submitted.slurm

    @property
    def run(self) -> Path:
        return self.submitted.run

    @property
    def other_node(self) -> str:
        """Of the job, not the one its script runs on."""
        return self.submitted.nodes()[1]

    def kill(self, processes: Sequence[int], signal: str = "KILL") -> float:
        now = time.time()
        assert processes
        self.slurm.run("kill", f"-{signal}", *processes)
        return now

    def rank(self, number: int) -> list[int]:
        return [rank.pid for rank in read_ranks(self.run) if rank.rank == number and rank.pid]


@dataclass
class Seen:
    """Moments of one fault, in seconds since the epoch."""

    struck: float
    last_step: int = 0  # before the run went back
    noticed: float | None = None
    decision: Decision | None = None
    begun: float | None = None  # the next start's rank 0
    parts: dict[str, float] = field(default_factory=dict)
    started: float | None = None
    from_step: int | None = None
    stepped: float | None = None

    def row(self, case: str, name: str) -> dict[str, report.Figure]:
        row: dict[str, report.Figure] = {"case": case, "candidate": name}
        if self.decision:
            row["cause"] = self.decision.cause
            noticed = min(self.noticed or self.decision.time, self.decision.time)
            row |= {"noticed": max(0.0, noticed - self.struck), "ended": self.decision.time - max(noticed, self.struck)}
        else:
            row["cause"] = "(SLURM's own)"
        if self.begun and self.started and self.stepped and self.from_step is not None:
            reading = self.parts.get("checkpoint", 0.0)
            row |= {
                "lost": self.last_step - self.from_step,
                "queued": self.begun - (self.decision.time if self.decision else self.struck),
                "imports": self.started - self.begun - reading,
                "checkpoint": reading,
                "first_step": self.stepped - self.started,
                "seconds": self.stepped - self.struck,
            }
        return row


class Look:
    """Follows a run from outside, as its folder shows it."""

    def __init__(self, site: Site) -> None:
        self.site, self.run = site, site.run
        self.decisions, self.starts = len(read_decisions(self.run)), len(start_numbers(self.run))
        self.said = len(site.submitted.log())

    def until_decided(self, struck: float) -> Seen:
        seen = Seen(struck)
        self.wait(lambda: self._decided(seen), 180)
        return seen

    def _decided(self, seen: Seen) -> bool:
        seen.last_step = max(seen.last_step, *self.site.submitted.tiny.steps(), 0)
        if seen.noticed is None:
            ends = [r.time for r in read_ranks(self.run) if r.state != RUNNING and r.time >= seen.struck - 1]
            said = self.site.submitted.log()[self.said :]
            if ends or "got " in said or "ending the step" in said:
                seen.noticed = min([time.time(), *ends])
        decisions = read_decisions(self.run)
        if len(decisions) > self.decisions:
            seen.decision = decisions[-1]
        elif told := re.search(r"^ended: (\w+): .*", self.site.submitted.log()[self.said :], re.MULTILINE):
            # Nowhere else, where no disk takes it.
            seen.decision = Decision(time.time(), "", 1, told[1], told[0], None, requeue=False, counted=True)
        # A job that SLURM itself starts again elsewhere need not have had the time to say anything.
        return seen.decision is not None or len(start_numbers(self.run)) > self.starts

    def until_training(self, seen: Seen) -> None:
        self.wait(lambda: self._trains(seen), 240)

    def _trains(self, seen: Seen) -> bool:
        steps_before = self.site.submitted.tiny.steps()
        if len(start_numbers(self.run)) <= self.starts:  # asked to end, ranks may make another step and save
            seen.last_step = max(seen.last_step, *steps_before)
            return False
        records = read_metrics(self.run)
        at = max((i for i, record in enumerate(records) if record.get("event") == "started"), default=None)
        if at is None or records[at]["time"] < seen.struck:
            return False
        steps = [record for record in records[at:] if record["kind"] == "train"]
        if not steps:
            return False
        seen.started, seen.parts, seen.from_step = records[at]["time"], records[at]["seconds"], records[at]["step"]
        seen.stepped = steps[0]["time"]
        seen.begun = _begun(self.run)
        return True

    def wait(self, true: Callable[[], bool], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not true():
            if time.monotonic() > deadline:
                raise RuntimeError(f"nothing came of it in {timeout_s} s:\n{self.site.submitted.log()[-3000:]}")
            time.sleep(0.1)


def _begun(run_dir: Path) -> float:
    """When the newest start's rank 0 became a process."""
    lines = [json.loads(line) for line in (run_dir / LEDGER).read_text().splitlines()]
    return float([line["time"] for line in lines if line["kind"] == "begun"][-1])
