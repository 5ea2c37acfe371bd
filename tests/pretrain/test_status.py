"""Status files, the markers DONE and STOP, and what kind of failure an error is."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest
import torch

from configs.errors import Cause, DiskRefused, TakenOver, TrainingDiverged, UserError
from parallel.failures import cause_of
from pretrain.status import RankStatus, mark_done, unmark_done
from pretrain.stop_signals import StopRequest


def test_status_is_replaced_whole(tmp_path: Path) -> None:
    status = RankStatus(tmp_path, 3, start=2, step=7)
    status.write("running")
    status.step = 9
    status.write("failed", "node", "rank 3: gone")
    [path] = (tmp_path / "ranks").iterdir()
    facts = json.loads(path.read_text())
    assert path.name == "rank-00003.json" and facts.pop("time") > 1.7e9
    assert {key: facts[key] for key in ("start", "rank", "state", "step", "cause", "detail")} == {
        "start": 2, "rank": 3, "state": "failed", "step": 9, "cause": "node", "detail": "rank 3: gone",
    }  # fmt: skip


def test_a_disk_that_refuses_hides_nothing(tmp_path: Path) -> None:
    RankStatus(tmp_path / "gone", 0).write("failed", "disk", "no room")
    assert not (tmp_path / "gone").exists()


def test_markers(tmp_path: Path) -> None:
    mark_done(tmp_path, 12)
    assert json.loads((tmp_path / "DONE").read_text())["step"] == 12
    unmark_done(tmp_path)
    unmark_done(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_file_stops_a_run(tmp_path: Path) -> None:
    stop = StopRequest()
    stop.watch_for(tmp_path / "STOP")
    assert not stop
    (tmp_path / "STOP").touch()
    assert stop and "STOP" in str(stop.name)


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (UserError("f", "e", "r"), "configuration"),
        (DiskRefused("f", "e", "r"), "disk"),
        (TrainingDiverged("f", "e", "r"), "nan"),
        (TakenOver("f", "e", "r"), "interrupted"),
        (MemoryError(), "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), "out_of_memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "disk"),
        (ConnectionResetError(), "unknown"),
        (RuntimeError("[/build/gloo/tcp/pair.cc:1] Connection closed by peer [127.0.0.1]:1"), "node"),
        (RuntimeError("Timed out waiting 6000ms for recv operation to complete"), "node"),
        (KeyboardInterrupt(), "interrupted"),
        (ZeroDivisionError("x"), "unknown"),
    ],
)
def test_causes(error: BaseException, cause: Cause) -> None:
    assert cause_of(error) == cause
