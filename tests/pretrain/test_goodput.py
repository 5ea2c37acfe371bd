"""Where the time went: sums over all starts, losses included."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.goodput import LEDGER, LedgerFile, ledger
from pretrain.metrics import Metrics


def written(folder: Path, lines: list[dict[str, Any]]) -> Path:
    (folder / LEDGER).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_two_starts_with_a_crash_between(tmp_path: Path) -> None:
    found = ledger(
        written(
            tmp_path,
            [
                {"start": 1, "kind": "begun", "time": 100.0},
                {"start": 1, "kind": "started", "time": 110.0, "step_seconds": 0.0},
                {"start": 1, "kind": "train", "time": 140.0, "step_seconds": 29.0},
                {"start": 1, "kind": "saved", "time": 142.0, "seconds": 2.0},
                {"start": 1, "kind": "train", "time": 163.0, "step_seconds": 50.0},  # then it died
                {"start": 2, "kind": "begun", "time": 200.0},
                {"start": 2, "kind": "started", "time": 215.0, "step_seconds": 29.0},  # from the checkpoint
                {"start": 2, "kind": "eval", "time": 220.0, "seconds": 4.0},
                {"start": 2, "kind": "train", "time": 260.0, "step_seconds": 70.0},
            ],
        )
    )
    assert found is not None
    assert (found.steps, found.lost, found.saves, found.evals) == (70.0, 21.0, 2.0, 4.0)
    assert (found.starts, found.waiting) == (25.0, 37.0)
    assert found.total == 160.0 and found.goodput == pytest.approx(70 / 160)


def test_a_rollback_within_one_start_is_work_lost(tmp_path: Path) -> None:
    lines = [{"start": 1, "kind": "begun", "time": 0.0}]
    for time, seconds in ((1.0, 0.0), (6.0, 5.0), (6.5, 2.0), (9.5, 5.0)):
        lines.append({"start": 1, "kind": "train", "time": time, "step_seconds": seconds})
    found = ledger(written(tmp_path, lines))
    assert found is not None and found.steps == 5.0 and found.lost == 3.0


@given(st.lists(st.tuples(st.floats(0, 50), st.booleans()), min_size=1, max_size=30))
def test_parts_are_never_negative_and_sum_to_the_wall(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[float, bool]]
) -> None:
    """Whatever is lost where."""
    lines: list[dict[str, Any]] = [{"start": 1, "kind": "begun", "time": 0.0}]
    clock, done, saved = 0.0, 0.0, 0.0
    for seconds, crashes in steps:
        clock, done = clock + seconds + 0.5, done + seconds
        lines.append({"start": 1, "kind": "train", "time": clock, "step_seconds": done})
        if crashes:
            clock, done = clock + 3.0, saved
            lines.append({"start": 2, "kind": "begun", "time": clock})
            clock += 1.0
            lines.append({"start": 2, "kind": "started", "time": clock, "step_seconds": done})
        else:
            saved = done
    found = ledger(written(tmp_path_factory.mktemp("ledger"), lines))
    assert found is not None
    assert min(vars(found).values()) >= 0
    assert found.total == pytest.approx(clock, abs=1e-6)
    assert found.steps == pytest.approx(done) and 0 <= found.goodput <= 1


def test_metrics_feed_it_and_a_resume_forgets_nothing(tmp_path: Path) -> None:
    for start, from_step in ((1, 0), (2, 1)):
        with Metrics(tmp_path, from_step, 10, start=start) as metrics:
            metrics.write("event", from_step, {"event": "started", "step_seconds": float(from_step)})
            for step in (from_step + 1, from_step + 2):
                metrics.write("train", step, {"loss": 1.0, "step_seconds": float(step)})
    kinds = [(line["start"], line["kind"]) for line in map(json.loads, (tmp_path / LEDGER).read_text().splitlines())]
    assert kinds == [(n, kind) for n in (1, 2) for kind in ("begun", "started", "train", "train")]
    found = ledger(tmp_path)
    assert found is not None and found.steps == 3.0 and found.lost == 1.0


def test_no_run_no_ledger(tmp_path: Path) -> None:
    assert ledger(tmp_path) is None
    LedgerFile(tmp_path, 1).close()
    (tmp_path / LEDGER).write_text((tmp_path / LEDGER).read_text() + '{"start": 1, "ki')
    found = ledger(tmp_path)
    assert found is not None and found.total == 0 and found.goodput == 0
