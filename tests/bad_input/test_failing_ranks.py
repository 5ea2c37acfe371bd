"""A rank that fails, dies or hangs ends the job soon, and its own error is the first thing told.

Real launcher, 4 gloo ranks over tensor and pipeline parallelism.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from slurm.environ import free_port

ROOT = Path(__file__).resolve().parents[2]
Site = Any


@pytest.mark.parametrize(
    ("fault", "rank", "first", "cause", "limits"),
    [
        ("raise", 3, r"rank 3 failed, and ends the run:\nTraceback", "unknown", ()),
        # which also keeps the ranks' meeting point
        ("raise", 0, r"rank 0 failed, and ends the run:\nTraceback", "unknown", ()),
        ("memory", 2, r"rank 2 failed, and ends the run:\nTraceback", "out_of_memory", ()),
        ("kill", 2, r"rank \d lost contact with another rank", "node", ()),
        (
            "kill",
            0,
            r"rank \d (lost contact with another rank|ends, as rank 0, which keeps the store, is gone)",
            "node",
            (),
        ),
        ("hang", 1, r"rank \d lost contact with another rank, .* or hangs", "node", ("collective_timeout_s=6",)),
        # Stands still with its connections open, as on a node that is frozen or cut off: nothing but its silence tells.
        ("freeze", 2, r"rank 2 on \S+ is silent for \d+ s", "node", ("silent_s=5",)),
        ("freeze", 0, r"rank 0, which keeps the store, is gone", "node", ("silent_s=5",)),
        ("hang", 1, r"rank \d hangs: no progress for \d+ s", "hang", ("watchdog_s=6",)),
    ],
)
def test_job_ends_with_one_error(
    site: Site, fault: str, rank: int, first: str, cause: str, limits: tuple[str, ...]
) -> None:
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--quiet", "--num_accelerators", "4"]
    overrides = [
        f"run_dir={site.folder / 'failing'}", "train.steps=500", "parallel={tensor: 2, pipeline: 2}",
        *(f"cluster.{limit}" for limit in limits),
    ]  # fmt: skip
    began = time.monotonic()
    done = subprocess.run(
        [
            *launcher,
            f"--master_port={free_port()}",
            "tests/parallel/failing_main.py",
            "--config",
            str(site.config),
            *overrides,
        ],
        cwd=ROOT,
        env={**os.environ, "FAULT": fault, "FAULT_RANK": str(rank), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    seconds = time.monotonic() - began
    told = re.sub(r"\[\d{4}-.*\] \[(WARNING|INFO|ERROR)\].*\n", "", done.stderr)  # the launcher's own
    assert done.returncode != 0
    assert re.search(first, told), told
    # The start of four ranks and two steps, a time-out where one hangs, and the end; the launcher waits 30 s for one
    # that is frozen before it kills it.
    assert seconds < (150 if fault == "freeze" else 90), f"{seconds:.0f} s\n{told}"
    raised = fault in ("raise", "memory")
    assert told.count("Traceback") == raised, told
    if raised:
        error = "ZeroDivisionError: a fault of this rank's own" if fault == "raise" else "can't allocate memory"
        assert error in told
        lines = [line for line in told.splitlines() if line.startswith("rank ")]
        assert lines[0].startswith(f"rank {rank} failed"), "its own error comes first"
        assert all(line.startswith(tuple(f"rank {r} ends, as rank {rank}: " for r in range(4))) for line in lines[1:])
    left = subprocess.run(["pgrep", "-f", str(site.folder / "failing")], capture_output=True, text=True)
    assert not left.stdout, "processes are left"
    check_statuses(site.folder / "failing", rank, fault, cause)
    if cause == "hang":
        check_stacks(site.folder / "failing", rank, told)


def check_statuses(run: Path, rank: int, fault: str, cause: str) -> None:
    """One rank says what it was; those that could not say anything still stand as running."""
    statuses = [json.loads((run / "ranks" / f"rank-{r:05d}.json").read_text()) for r in range(4)]
    causes = [status["cause"] for status in statuses if status["cause"]]
    assert causes and set(causes) == {cause}, statuses
    silent = fault in ("kill", "freeze")
    assert all(
        status["state"] == ("running" if silent and r == rank else "failed") for r, status in enumerate(statuses)
    )
    assert all(status["detail"] for status in statuses if status["state"] == "failed")
    if fault in ("raise", "memory"):
        assert [status["cause"] is not None for status in statuses] == [r == rank for r in range(4)]


def check_stacks(run: Path, rank: int, told: str) -> None:
    """Who hangs where, and which collective the others wait in."""
    stacks = [(run / "ranks" / f"rank-{r:05d}.stack.txt").read_text() for r in range(4)]
    assert all("Thread" in stack and "main.py" in stack for stack in stacks)
    assert "next_micro_batches" in stacks[rank]
    assert re.search(rf"rank {rank} is in next_micro_batches, parallel/failing_main.py:\d+", told), told
    others = re.findall(r"rank [\d, ]+ waits in (\w+) over (ranks \[[\d, ]+\]|a group), called by \w+", told)
    assert others, told
