"""A rank that fails, dies or hangs ends the job soon, and its own error is the first thing told.

4 gloo ranks over tensor and pipeline parallelism. They are forks of one process that has imported all; a real launcher
is asked once, as its own ways of ending ranks take half a minute.
"""

from __future__ import annotations

import errno
import io
import json
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from configs.errors import RankFailed
from parallel.failures import Ending, working_together
from slurm.environ import free_port

ROOT = Path(__file__).resolve().parents[2]
FAILING_MAIN = ROOT / "tests/parallel/failing_main.py"
Site = Any


@dataclass(frozen=True)
class Ended:
    """What became of four ranks."""

    codes: tuple[int | None, ...]
    left: list[int]  # that live on when the others have ended
    seconds: float
    told: str


def start(arguments: list[str], fault: str, rank: int, said: Path) -> Ended:
    """Four ranks of the trainer, one of which meets a fault; to the end of all that end by themselves."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pretrain.rank_imports"])
    port, began = str(free_port()), time.monotonic()
    processes = []
    for number in range(4):
        environ = {
            "RANK": str(number), "WORLD_SIZE": "4", "LOCAL_RANK": str(number), "LOCAL_WORLD_SIZE": "4",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "FAULT": fault, "FAULT_RANK": str(rank),
        }  # fmt: skip
        processes.append(context.Process(target=be_a_rank, args=(arguments, environ, str(said)), daemon=True))
        processes[-1].start()
    try:
        for number, process in enumerate(processes):
            if (fault, number) != ("freeze", rank):
                process.join(timeout=120)
        left = [number for number, process in enumerate(processes) if process.exitcode is None]
        seconds = time.monotonic() - began
    finally:
        for process in processes:
            process.kill()
            process.join()
    return Ended(tuple(process.exitcode for process in processes), left, seconds, said.read_text())


def be_a_rank(arguments: list[str], environ: dict[str, str], said: str) -> None:
    log = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environ)
    sys.argv = [str(FAILING_MAIN), *arguments]
    runpy.run_path(sys.argv[0], run_name="__main__")


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
    site: Site, tmp_path: Path, fault: str, rank: int, first: str, cause: str, limits: tuple[str, ...]
) -> None:
    overrides = [
        f"run_dir={site.folder / 'failing'}", "train.steps=500", "parallel={tensor: 2, pipeline: 2}",
        *(f"cluster.{limit}" for limit in limits),
    ]  # fmt: skip
    ended = start(["--config", str(site.config), *overrides], fault, rank, tmp_path / "said")
    told = ended.told
    assert 0 not in ended.codes and all(ended.codes), ended.codes
    assert re.search(first, told), told
    # The start of four ranks and two steps, a time-out where one hangs, and the end.
    assert ended.seconds < 90, f"{ended.seconds:.0f} s\n{told}"
    raised = fault in ("raise", "memory")
    assert told.count("Traceback") == raised, told
    if raised:
        error = "ZeroDivisionError: a fault of this rank's own" if fault == "raise" else "can't allocate memory"
        assert error in told
        lines = [line for line in told.splitlines() if line.startswith("rank ")]
        assert lines[0].startswith(f"rank {rank} failed"), "its own error comes first"
        assert all(line.startswith(tuple(f"rank {r} ends, as rank {rank}: " for r in range(4))) for line in lines[1:])
    assert ended.left == ([rank] if fault == "freeze" else []), "processes are left"
    check_statuses(site.folder / "failing", rank, fault, cause)
    if cause == "hang":
        check_stacks(site.folder / "failing", rank, told)


def test_a_launcher_that_is_gone_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its pipes went with it; what a rank has to say still goes on record."""
    said: list[Ending] = []
    with monkeypatch.context() as patch, pytest.raises(RankFailed):
        patch.setattr(sys, "stderr", GoneStream())
        with working_together(0, 1, report=said.append):
            raise ZeroDivisionError("a fault of this rank's own")
    assert [ending.cause for ending in said] == ["unknown"] and "ZeroDivisionError" in said[0].detail


class GoneStream(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_under_a_launcher(site: Site) -> None:
    """Which passes the failure on, and leaves nobody behind."""
    command = [
        str(Path(sys.executable).parent / "deepspeed"), "--quiet", "--num_accelerators", "4",
        f"--master_port={free_port()}", str(FAILING_MAIN.relative_to(ROOT)), "--config", str(site.config),
        f"run_dir={site.folder / 'failing'}", "train.steps=500", "parallel={tensor: 2, pipeline: 2}",
    ]  # fmt: skip
    environ = {**os.environ, "FAULT": "kill", "FAULT_RANK": "2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0 and "lost contact with another rank" in done.stderr, done.stderr
    left = subprocess.run(["pgrep", "-f", str(site.folder / "failing")], capture_output=True, text=True)
    assert not left.stdout, "processes are left"
    check_statuses(site.folder / "failing", 2, "kill", "node")


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
