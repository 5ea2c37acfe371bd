"""Beside a step: how long srun may outlive its ranks, and how a node is missed that says nothing."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import DiskRefused, RankFailed
from pretrain import status
from pretrain.status import RankStatus as Writer
from pretrain.status import starting_up
from slurm.run_folder import RankStatus, read_ranks
from slurm.watch import Beats, patience

STOPPED, FAILED, RUNNING, DONE = (RankStatus(0, s, host="n") for s in ("stopped", "failed", "running", "done"))


@pytest.mark.parametrize(
    ("ranks", "gone", "seconds"),
    [
        ((), False, None),
        ((RUNNING, RUNNING), False, None),
        ((DONE, DONE), False, 60),
        ((STOPPED, FAILED), False, 60),
        ((FAILED,), False, 60),
        ((RUNNING, FAILED), False, 60),
        ((RUNNING, STOPPED), False, 600),  # may still be saving
        ((DONE,), False, 600),
        ((RUNNING, RUNNING), True, 60),
        ((RUNNING,), True, 60),
    ],
)
def test_how_long_srun_may_outlive_its_ranks(ranks: tuple[RankStatus, ...], gone: bool, seconds: float | None) -> None:
    found = patience(ranks, 2, 60.0, lambda _: "is gone" if gone else None)
    assert (found and found[0]) == seconds


class Nodes:
    """Ranks 0 and 1 on node a, 2 and 3 on node b, looked at once a second."""

    def __init__(self, silent_s: float = 30.0) -> None:
        self.beats, self.ranks = Beats(silent_s), [replace(RUNNING, rank=r, host="aabb"[r]) for r in range(4)]

    def look(self, seconds: int, *heard: int, passed_s: float = 1.0) -> dict[str, float]:
        """While those ranks are heard."""
        found: dict[str, float] = {}
        for _ in range(seconds):
            self.ranks = [replace(r, beat=r.beat + (r.rank in heard)) for r in self.ranks]
            found = self.beats.silent_nodes(self.ranks, passed_s)
        return found


def test_a_node_is_silent_when_none_of_its_ranks_is_heard() -> None:
    nodes = Nodes()
    assert nodes.look(100, 0, 1, 2, 3) == {}
    assert nodes.look(100, 0, 2) == {}  # one rank a node: its own peers see to the others
    assert nodes.look(29, 0, 1) == {}
    assert set(nodes.look(10, 0, 1)) == {"b"}
    assert nodes.look(1, 0, 1, 3) == {}  # only slow


def test_where_nobody_is_heard_it_is_the_disk() -> None:
    nodes = Nodes()
    assert nodes.look(5, 0, 1, 2, 3) == {}
    for _ in range(100):
        assert nodes.look(1) == {}


def test_clocks_that_differ_and_a_watch_that_stood_still_mean_nothing() -> None:
    nodes = Nodes()
    nodes.ranks = [replace(r, beat=(10**18, -5)[r.rank // 2]) for r in nodes.ranks]  # years apart
    assert nodes.look(60, 0, 2) == {}
    assert nodes.look(1, 0, passed_s=2.0) == {}  # whatever the clock says, the caller allows for two polls at most


def test_ranks_that_have_ended_are_not_missed() -> None:
    nodes = Nodes()
    nodes.ranks = [replace(r, state="done") if r.rank > 1 else r for r in nodes.ranks]
    assert nodes.look(100, 0, 1) == {}


# ---- the beat itself ------------------------------------------------------------------------------------------------
@pytest.fixture
def quick_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "BEAT_S", 0.05)


def beats(run_dir: Path, seconds: float = 0.4) -> bool:
    """Whether the file's time goes on."""
    [before] = read_ranks(run_dir)
    time.sleep(seconds)
    return read_ranks(run_dir)[0].beat != before.beat


def test_a_rank_beats_while_it_runs(tmp_path: Path, quick_beats: None) -> None:
    writer = Writer(tmp_path, 0, start=1)
    writer.write("running")
    assert beats(tmp_path)
    writer.write("stopped")
    assert not beats(tmp_path)


def test_a_last_word_needs_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that is full nothing new can be written, but over what is there."""
    writer = Writer(tmp_path, 0, start=1)
    writer.write("running")

    def refuse(self: Path, *_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", refuse)
    writer.write("failed", "disk", "no room")
    [rank] = read_ranks(tmp_path)
    assert (rank.state, rank.cause, rank.detail) == ("failed", "disk", "no room")
    assert [path.name for path in (tmp_path / "ranks").iterdir()] == ["rank-00000.json"]


def test_an_older_start_does_not_beat_for_a_newer_one(tmp_path: Path, quick_beats: None) -> None:
    Writer(tmp_path, 0, start=1).write("running")
    newer = Writer(tmp_path, 0, start=2)
    newer.write("running")
    newer._ended.set()  # as if killed
    time.sleep(0.2)
    assert not beats(tmp_path)


def test_on_record_before_the_ranks_meet(tmp_path: Path, quick_beats: None) -> None:
    with pytest.raises(DiskRefused), starting_up(tmp_path, 3):
        [rank] = read_ranks(tmp_path)
        assert (rank.rank, rank.state, rank.start, rank.pid) == (3, "running", 0, os.getpid()) and beats(tmp_path)
        raise DiskRefused("no room", "room", "make room")
    [rank] = read_ranks(tmp_path)
    assert (rank.state, rank.cause) == ("failed", "disk") and "no room" in rank.detail and not beats(tmp_path)


def test_what_was_said_after_the_ranks_met_stands(tmp_path: Path, quick_beats: None) -> None:
    with pytest.raises(RankFailed), starting_up(tmp_path, 0):
        Writer(tmp_path, 0, start=4).write("failed", "nan", "said")
        raise RankFailed(1)
    [rank] = read_ranks(tmp_path)
    assert (rank.start, rank.cause, rank.detail) == (4, "nan", "said")
