"""A rank that fails, dies or hangs ends the job soon, and its own error is the first thing told.

Real launcher, 4 gloo ranks over tensor and pipeline parallelism.
"""

from __future__ import annotations

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
    ("fault", "rank", "first"),
    [
        ("raise", 3, r"rank 3 failed, and ends the run:\nTraceback"),
        ("raise", 0, r"rank 0 failed, and ends the run:\nTraceback"),  # which also keeps the ranks' meeting point
        ("kill", 2, r"rank \d lost contact with another rank"),
        ("kill", 0, r"rank \d (lost contact with another rank|ends, as rank 0, which keeps the store, is gone)"),
        ("hang", 1, r"rank \d lost contact with another rank, .* or hangs"),
    ],
)
def test_job_ends_with_one_error(site: Site, fault: str, rank: int, first: str) -> None:
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--quiet", "--num_accelerators", "4"]
    overrides = [
        f"run_dir={site.folder / 'failing'}", "train.steps=500", "parallel={tensor: 2, pipeline: 2}",
        "cluster.collective_timeout_s=6",
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
        timeout=150,
    )
    seconds = time.monotonic() - began
    told = re.sub(r"\[\d{4}-.*\] \[(WARNING|INFO|ERROR)\].*\n", "", done.stderr)  # the launcher's own
    assert done.returncode != 0
    assert re.search(first, told), told
    # The start of four ranks and two steps, a time-out where one hangs, and the end.
    assert seconds < 60, f"{seconds:.0f} s\n{told}"
    assert told.count("Traceback") == (fault == "raise"), told
    if fault == "raise":
        assert "ZeroDivisionError: a fault of this rank's own" in told
        lines = [line for line in told.splitlines() if line.startswith("rank ")]
        assert lines[0].startswith(f"rank {rank} failed"), "its own error comes first"
        assert all(re.fullmatch(rf"rank \d ends, as rank {rank}: ZeroDivisionError: .*", line) for line in lines[1:])
    left = subprocess.run(["pgrep", "-f", str(site.folder / "failing")], capture_output=True, text=True)
    assert not left.stdout, "processes are left"
