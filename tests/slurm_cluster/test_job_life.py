"""`glam submit` on a real SLURM: a job that lives over time limits, ends when told, and stays ended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.slurm_cluster.cluster import Slurm
from tests.slurm_cluster.tiny_run import GLAM, TinyRun


class Submitted:
    """A submitted run."""

    def __init__(self, slurm: Slurm, tiny: TinyRun, folder: Path) -> None:
        self.slurm, self.tiny, self.folder = slurm, tiny, folder

    def submit(self, *words: str, code: int = 0, **site: Any) -> str:
        tree = {"ranks_per_node": 2, "time_limit": "10", "warning_s": 60, "kill_wait_s": 5, "run_root": "/", **site}
        (self.folder / "cluster.yaml").write_text(yaml.safe_dump(tree))
        given = ("--cluster", self.folder / "cluster.yaml", "--nodes", "2", "train.steps=100000", *words)
        return self.slurm.run(*GLAM, "submit", self.tiny.config, *given, code=code)

    @property
    def job(self) -> int:
        newest = sorted((self.tiny.run / "submits").iterdir())[-1]
        return int(json.loads((newest / "job.json").read_text())["job"])

    @property
    def log(self) -> str:
        path = sorted((self.tiny.run / "submits").iterdir())[-1] / "job.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def until_it_trains(self, starts: int = 1) -> None:
        begun = self.tiny.starts() + starts
        steps = len(self.tiny.steps())

        def trains() -> bool:
            return self.tiny.starts() >= begun and len(self.tiny.steps()) > steps + 2

        self.slurm.until(self.job, trains, "to train", 90)

    def decisions(self) -> list[dict[str, Any]]:
        path = self.tiny.run / "restarts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def submitted(slurm: Slurm, tiny: TinyRun, tmp_path: Path) -> Submitted:
    return Submitted(slurm, tiny, tmp_path)


def test_over_a_time_limit_and_stopped(submitted: Submitted) -> None:
    slurm, tiny = submitted.slurm, submitted.tiny
    submitted.submit()
    job = submitted.job
    assert f"job {job} of" in submitted.submit(code=2), "a second one of a live run is refused"
    submitted.until_it_trains()
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=1")  # the warning is due at the next tick
    slurm.until(job, lambda: slurm.restarts(job) == 1, "to be queued again", 70)
    stopped = submitted.decisions()[0]
    assert (stopped["cause"], stopped["requeue"], stopped["counted"]) == ("time_limit", True, False), submitted.log
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    slurm.until(job, lambda: len(tiny.steps()) > stopped["step"], "to go on", 90)
    assert "goodput" in slurm.run(*GLAM, "status", tiny.run)
    slurm.run(*GLAM, "stop", tiny.run)
    assert slurm.wait(job) == "COMPLETED" and slurm.restarts(job) == 1
    assert submitted.decisions()[-1]["cause"] == "stop"
    last = tiny.steps()[-1]
    assert tiny.steps() == list(range(1, last + 1)) and tiny.saved_steps()[-1] == last


def test_preempted_and_cancelled(submitted: Submitted) -> None:
    """Preempted, it comes back by itself; cancelled by hand, it does not."""
    slurm = submitted.slurm
    submitted.submit(partition="scavenge")
    job = submitted.job
    submitted.until_it_trains()
    slurm.sbatch("#!/bin/bash\nsleep 2\n", "-p", "urgent", "-N2", "--exclusive")
    slurm.until(job, lambda: slurm.restarts(job) == 1, "to be queued again", 60)
    assert submitted.decisions()[0]["cause"] == "preempted", submitted.log
    slurm.until(job, lambda: submitted.tiny.starts() == 2, "to start again", 60)
    slurm.cancel(job)
    assert slurm.wait(job) == "CANCELLED", submitted.log
    assert slurm.restarts(job) == 1 and not submitted.decisions()[-1]["requeue"]


@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_under_the_launchers(submitted: Submitted, launcher: str) -> None:
    submitted.submit("--launcher", launcher, "train.steps=5")
    assert submitted.slurm.wait(submitted.job, timeout_s=90) == "COMPLETED", submitted.log
    assert submitted.tiny.steps() == [1, 2, 3, 4, 5] and submitted.decisions()[-1]["cause"] == "done"


def test_refused_before_anything_is_queued(submitted: Submitted) -> None:
    assert "did you mean 'batch'" in submitted.submit(code=2, partition="bacth")
    assert "4 nodes; partition batch has 2" in submitted.submit("--nodes", "4", code=2, ranks_per_node=1)
    assert "sbatch refuses" in submitted.submit(code=2, sbatch_options=["--constraint=none"])
    assert not (submitted.tiny.run / "submits").exists() or not list((submitted.tiny.run / "submits").iterdir())
    assert submitted.slurm.run("squeue", "-h") == ""
