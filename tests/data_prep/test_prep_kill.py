"""Killed at any moment and run again: the same bytes. And the same for any number of workers, under MPI too."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data_prep.pipeline import STAGES, prepare
from tests.data_prep.mixed import mixed_config, tree_hashes

ROOT = Path(__file__).resolve().parents[2]
KILLS = 20


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder of the sources, and what one process makes of them in one go."""
    folder = tmp_path_factory.mktemp("mixed")
    assert prepare(mixed_config(folder / "sources", folder / "out")) is not None
    return folder / "sources", tree_hashes(folder / "out")


def command(config: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "pretrain.cli", "prep", str(config), *more]


def watch(run: subprocess.Popen[bytes], output: Path, seen: set[str], target: int) -> set[str]:
    """Until it ends, or so many files have been seen."""
    while run.poll() is None and len(seen) < target:
        seen |= {f"{folder}/{name}" for folder, _, names in os.walk(output) for name in names}
        time.sleep(0.002)
    return seen


def test_the_corpus_takes_every_stage(undisturbed: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """So that what follows says something about each."""
    summary = prepare(mixed_config(undisturbed[0], tmp_path / "out"))
    assert summary is not None
    web, books, table = summary.sources
    assert books.rejects == 2 and table.rejects == 1 and sum(books.cleaned.values()) > 0
    assert web.stages["dedup"]["exact"] > 20 and table.stages["dedup"]["near"] > 20
    assert 0 < web.stages["quality"]["kept"] < web.stages["quality"]["scored"] and books.low_quality == 0
    assert any(row.shards > 1 for row in summary.datasets)


@pytest.mark.parametrize(
    "changes",
    [{"workers": 2}, {"workers": 4, "unit_bytes": 15_000}, {"unit_bytes": 10**9}, {"unit_bytes": 8_000}],
    ids=lambda changes: " ".join(f"{key}={value}" for key, value in changes.items()),
)
def test_neither_workers_nor_units_change_a_byte(
    undisturbed: tuple[Path, dict[str, str]], tmp_path: Path, changes: dict[str, int]
) -> None:
    prepare(mixed_config(undisturbed[0], tmp_path / "out", **changes))
    assert tree_hashes(tmp_path / "out") == undisturbed[1]


def test_mpi_ranks_make_the_same_bytes(undisturbed: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    config = mixed_config(undisturbed[0], tmp_path / "out")
    (tmp_path / "config.yaml").write_text(config.dump())
    mpiexec = [str(Path(sys.executable).parent / "mpiexec"), "-n", "3"]
    done = subprocess.run(
        mpiexec + command(tmp_path / "config.yaml"), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("vocabulary 400") == 1, "the first rank speaks for all"
    assert tree_hashes(tmp_path / "out") == undisturbed[1]


def test_stage_by_stage_is_in_one_go(undisturbed: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    config = mixed_config(undisturbed[0], tmp_path / "out")
    for stage in STAGES[:-1]:
        assert prepare(config, until=stage) is None
        assert (tmp_path / "out" / "work" / stage / "stage.json").is_file()
        assert not (tmp_path / "out" / "train").exists()
    assert prepare(config) is not None
    assert tree_hashes(tmp_path / "out") == undisturbed[1]


def test_kill_9_at_twenty_random_points(undisturbed: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    """Each run goes on from what the killed one left, and is killed when so many more files have been seen."""
    output = tmp_path / "out"
    (tmp_path / "config.yaml").write_text(mixed_config(undisturbed[0], output, unit_bytes=15_000).dump())
    watched = mixed_config(undisturbed[0], tmp_path / "watched", unit_bytes=15_000)
    (tmp_path / "watched.yaml").write_text(watched.dump())
    run = subprocess.Popen(command(tmp_path / "watched.yaml"), cwd=ROOT, stdout=subprocess.DEVNULL)
    ever = watch(run, tmp_path / "watched", set(), 10**9)
    random_source, seen = random.Random(time.time_ns()), set[str]()
    targets = sorted(random_source.randrange(len(ever)) for _ in range(KILLS))
    killed = 0
    for number, target in enumerate(targets):
        run = subprocess.Popen(
            command(tmp_path / "config.yaml", "--workers", "2" if number % 2 else "1"), cwd=ROOT,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        watch(run, output, seen, target)
        if run.poll() is None:
            # The workers die with their parent; every second time they are killed with it.
            os.killpg(run.pid, signal.SIGKILL) if number % 4 < 2 else os.kill(run.pid, signal.SIGKILL)
        killed += run.wait(timeout=60) == -signal.SIGKILL
    done = subprocess.run(
        command(tmp_path / "config.yaml"), cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert tree_hashes(output) == undisturbed[1], f"killed {killed} times, at {targets} files"
    assert killed >= KILLS // 2, f"only {killed} runs were killed: {len(seen)} files were seen"
