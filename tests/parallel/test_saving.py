"""Saves beside training: the snapshot is the state of its step, a crash harms nothing, one owner, retention, room."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.errors import UserError
from configs.run import RunConfig
from pretrain.checkpoint_folders import complete_checkpoints, to_be_dropped
from pretrain.incarnation import Incarnation
from pretrain.local_ranks import LocalRanksFailed, run_ranks
from tests.conftest import MakeData
from tests.parallel.checkpoint_jobs import (
    finish_job,
    gone_job,
    killed_job,
    move_job,
    owners_job,
    save_beside_job,
    stay_job,
    swept_job,
    thinned_job,
    unreadable_job,
)
from tests.parallel.jobs import assemble
from tests.tiny import tiny_config


@pytest.fixture
def config(make_data: MakeData) -> RunConfig:
    return configured(make_data)


def configured(make_data: MakeData, *overrides: str) -> RunConfig:
    plain = tiny_config("model.vocab_size=512", "train.batch_tokens=64", "train.micro_batch_sequences=1", *overrides)
    return plain.model_copy(update={"data": make_data(json=1.0, email=1.0)})


def assembled(ranks: list[dict[str, Any]], key: str) -> dict[str, torch.Tensor]:
    return assemble([rank[key] for rank in ranks])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("overrides", [(), ("train.precision=bf16",), ("parallel.zero_stage=0",)])
def test_snapshot_is_the_state_of_its_step(
    tmp_path: Path, make_data: MakeData, ranks: int, overrides: tuple[str, ...]
) -> None:
    """Though the copy is taken late and training goes on: the next update waits for it, and for nothing else."""
    config = configured(make_data, f"parallel.expert={ranks}", *overrides)
    found = run_ranks(ranks, save_beside_job, config, str(tmp_path), True, 0.4)
    loaded = run_ranks(ranks, move_job, config, [str(tmp_path)], 4)
    held, back = assembled(found, "held"), assemble([rank[0]["pieces"] for rank in loaded])
    assert all(torch.equal(held[name], back[name]) for name in held)
    assert loaded[0][0]["figures"] == found[0]["figures"], "both went on alike"
    [saved] = found[0]["saved"]
    assert saved.stall_s < 0.4 + saved.seconds and saved.stall_s > 0.1, "the update waited for the late copy"
    assert saved.copied_bytes > 0 and saved.bytes >= sum(t.nbytes for t in held.values())


def test_without_the_wait_the_snapshot_is_torn(tmp_path: Path, config: RunConfig) -> None:
    """What the test above would see."""
    [found] = run_ranks(1, save_beside_job, config, str(tmp_path), False, 1.5)
    [loaded] = run_ranks(1, move_job, config, [str(tmp_path)], 2)
    held, back = assembled([found], "held"), assemble([loaded[0]["pieces"]])
    assert any(not torch.equal(held[name], back[name]) for name in held)


def test_synchronous_saves_hold_the_same(tmp_path: Path, make_data: MakeData) -> None:
    beside, at_once = configured(make_data), configured(make_data, "train.async_save=false")
    states = []
    for name, config in (("beside", beside), ("at once", at_once)):
        [found] = run_ranks(1, save_beside_job, config, str(tmp_path / name), True, 0.0)
        [loaded] = run_ranks(1, move_job, config, [str(tmp_path / name)], 2)
        states.append(assemble([loaded[0]["pieces"]]))
        [saved] = found["saved"]
        assert (saved.copied_bytes > 0) == (name == "beside")
        assert saved.stall_s >= (saved.seconds if name == "at once" else 0), "at once: all of it"
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_crash_at_any_moment_harms_no_checkpoint(tmp_path: Path, make_data: MakeData, ranks: int) -> None:
    """Killed again and again while saves are under way; what comes out equals an undisturbed run to the bit."""
    config = configured(make_data, f"parallel.expert={ranks}")
    steps, random_s = 16, random.Random(5)
    whole = run_ranks(ranks, finish_job, config, str(tmp_path / "whole"), steps)
    crashes, folder = 0, str(tmp_path / "killed")
    while crashes < 6:
        after_s = random_s.uniform(0.001, 0.15)
        try:
            run_ranks(ranks, killed_job, config, folder, after_s, steps)
        except LocalRanksFailed:
            crashes += 1
        if any(path.name == f"step-{steps:08d}" for path in complete_checkpoints(Path(folder))):
            break
    assert crashes > 0
    last = run_ranks(ranks, finish_job, config, folder, steps)
    wanted, found = assembled(whole, "pieces"), assembled(last, "pieces")
    assert last[0]["begun"] > 0 and all(torch.equal(wanted[name], found[name]) for name in wanted)
    assert not list((tmp_path / "killed" / "checkpoints").glob("*damaged*")), "a name means: whole"
    assert not list((tmp_path / "killed" / "checkpoints").glob("*partial*")), "the next start cleans up"


def test_an_older_start_cannot_write_once_a_newer_has_begun(tmp_path: Path, config: RunConfig) -> None:
    [told] = run_ranks(1, owners_job, config, str(tmp_path))
    assert told["newer goes on from"].name == "step-00000001"
    assert "started again" in told["save"] and "started again" in told["save under way"]
    names = [path.name for path in (tmp_path / "checkpoints").iterdir()]
    assert sorted(names) == ["step-00000001", "step-00000002"]


def test_what_was_swept_away_is_never_committed(tmp_path: Path, config: RunConfig) -> None:
    [told] = run_ranks(1, swept_job, config, str(tmp_path))
    assert "could not be written" in told and "rank-00000" in told
    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000001"]


def test_an_older_start_moves_nothing_of_a_newer(tmp_path: Path, config: RunConfig) -> None:
    """It passed its check, slept while the newer one committed the same step, and wakes."""
    from pretrain.checkpoint import Checkpoints

    run_ranks(1, stay_job, config, str(tmp_path), 1, 1)  # start 1
    run_ranks(1, finish_job, config, str(tmp_path), 1)  # start 2: nothing to do
    manifest = (tmp_path / "checkpoints" / "step-00000001" / "manifest.json").read_bytes()
    older = Checkpoints(config.model_copy(update={"run_dir": str(tmp_path)}))  # start 3, made to believe it is start 1
    older.incarnation = Incarnation(older.incarnation.folder, 1, (tmp_path / "starts" / "000001.json").read_text())
    for start in (2, 3):
        (tmp_path / "starts" / f"00000{start}.json").unlink()
    partial = tmp_path / "checkpoints" / "step-00000001.partial-1"
    partial.mkdir()
    with pytest.raises(UserError, match="is there, by start 1"):
        older._commit(partial, partial.with_name("step-00000001"))
    assert (tmp_path / "checkpoints" / "step-00000001" / "manifest.json").read_bytes() == manifest


def test_a_run_folder_that_is_gone_does_not_come_back(tmp_path: Path, config: RunConfig) -> None:
    [told] = run_ranks(1, gone_job, config, str(tmp_path / "run"))
    assert "000001.json" in told and "is gone" in told
    assert list((tmp_path / "run").iterdir()) == []


def test_what_one_rank_cannot_read_is_not_called_damage(tmp_path: Path, make_data: MakeData) -> None:
    config = configured(make_data, "parallel.expert=2")
    run_ranks(2, stay_job, config, str(tmp_path), 1, 1)
    for told in run_ranks(2, unreadable_job, config, str(tmp_path)):
        assert "Too many open files" in told
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_what_cannot_be_removed_fails_no_save(tmp_path: Path, config: RunConfig) -> None:
    kept = config.model_copy(update={"train": config.train.model_copy(update={"keep_checkpoints": 1})})
    [saved] = run_ranks(1, thinned_job, kept, str(tmp_path))
    assert [one.step for one in saved] == [1, 2, 3]
    assert "step-00000003" in [path.name for path in complete_checkpoints(tmp_path)]


def test_starts_are_numbered_without_repetition(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(lambda _: Incarnation.take(tmp_path, 1), range(40)))
    assert sorted(start.number for start in taken) == list(range(1, 41))
    newest = max(taken, key=lambda start: start.number)
    newest.check()
    for start in taken:
        if start is not newest:
            with pytest.raises(UserError, match=f"start 40, this is start {start.number}"):
                start.check()


@pytest.mark.parametrize(
    ("keep", "every", "left"),
    [(1, None, [100]), (3, None, [80, 90, 100]), (2, 30, [30, 60, 90, 100]), (1, 50, [50, 100]), (20, 7, None)],
)
def test_retention(keep: int, every: int | None, left: list[int] | None) -> None:
    found = [Path(f"step-{step:08d}") for step in range(10, 101, 10)]
    dropped = to_be_dropped(found, keep, every)
    kept = [int(path.name[5:]) for path in found if path not in dropped]
    assert kept == (left or list(range(10, 101, 10)))


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 2.5 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting a small disk wants root")
    if subprocess.run([mount, "-t", "tmpfs", "-o", "size=2500k", "none", str(folder)], check=False).returncode:
        pytest.skip("no small disk can be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_save_that_does_not_fit_is_refused_before_it_starts(small_disk: Path, config: RunConfig) -> None:
    """About 0.9 MB each: two fit, the third does not; what was saved stays, and the run goes on from it."""
    config = config.model_copy(update={"train": config.train.model_copy(update={"keep_checkpoints": 9})})
    with pytest.raises(UserError, match="no room for a checkpoint"):
        run_ranks(1, killed_job, config, str(small_disk), 0.0, 5)
    names = sorted(path.name for path in (small_disk / "checkpoints").iterdir())
    assert names == ["step-00000001", "step-00000002"], "and nothing was begun"
    [found] = run_ranks(1, finish_job, config, str(small_disk), 3)
    assert found["begun"] == 2
    # The remedy of one who keeps fewer: what is beyond them makes room.
    fewer = config.model_copy(update={"train": config.train.model_copy(update={"keep_checkpoints": 1})})
    run_ranks(1, killed_job, fewer, str(small_disk), 0.0, 4)
    assert [path.name for path in complete_checkpoints(small_disk)] == ["step-00000004"]
