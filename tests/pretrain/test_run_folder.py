"""What a run leaves behind and takes up again: state, metrics, the picture; and the flag that signals raise."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pretrain.blocklist import Blocked
from pretrain.data import Cursor
from pretrain.health import LARGEST_NORM, BadStep, History, fit_to_apply
from pretrain.metrics import Metrics
from pretrain.metrics_file import drop_after, read_metrics
from pretrain.report import plot_run
from pretrain.state import TrainState
from pretrain.stop_signals import STOP_SIGNALS, StopRequest

# ---- health -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_skips_the_update(bad: float) -> None:
    assert not fit_to_apply(bad, 1.0)
    assert not fit_to_apply(1.0, bad)


@given(st.floats(-1e9, 1e9), st.floats(0, 1e17))
def test_finite_figures_apply(cross_entropy: float, norm: float) -> None:
    assert fit_to_apply(cross_entropy, norm)


def test_a_norm_whose_square_overflows_float32_skips_the_update() -> None:
    assert not fit_to_apply(1.0, LARGEST_NORM)
    assert np.isfinite(np.float32(LARGEST_NORM * 0.99) ** 2)
    assert not fit_to_apply(1.0, float(np.sqrt(np.finfo(np.float32).max)))


# ---- state ------------------------------------------------------------------------------------------------------
counts = st.dictionaries(st.text(max_size=5), st.integers(0, 2**60), max_size=4)
figures = st.lists(st.floats(0, 1e9), max_size=4)
entries = st.builds(
    Blocked,
    *(st.text(max_size=5),) * 2,
    st.integers(2, 9),
    st.integers(0, 9),
    st.integers(0, 9),
    *(st.integers(0),) * 2,
)
states = st.builds(
    TrainState,
    step=st.integers(0, 2**40),
    updates=st.integers(0, 2**40),
    tokens=st.integers(0, 2**60),
    skipped=st.lists(st.integers(0, 2**40)),
    seconds=st.floats(0, 1e9),
    cursor=st.builds(
        Cursor, drawn=counts, mixed=counts, weights=st.dictionaries(st.text(max_size=5), st.floats(0, 1), max_size=4)
    ),
    history=st.builds(History, st.text(max_size=5), figures, figures, figures),
    row=st.lists(
        st.builds(BadStep, st.integers(0, 9), *(st.text(max_size=5),) * 3, st.lists(entries, max_size=2).map(tuple)),
        max_size=2,
    ),
    blocklist=st.lists(entries, max_size=3),
)


@given(states)
def test_state_survives_json(state: TrainState) -> None:
    """Exactly: a weight that came back another float would start a new mixture."""
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_state_from_another_time_is_noticed() -> None:
    tree = TrainState().to_json()
    with pytest.raises(TypeError):
        TrainState.from_json({**tree, "unknown": 1})


def test_state_of_a_checkpoint_from_before_there_was_a_history() -> None:
    tree = TrainState(step=3, skipped=[2]).to_json()
    for key in ("history", "row", "blocklist"):
        del tree[key]
    assert TrainState.from_json(tree) == TrainState(step=3, skipped=[2])


def test_a_row_of_unfit_steps_says_where_a_rollback_may_go() -> None:
    bad = [BadStep(step, "not finite", "nan", "nan", ()) for step in (8, 9)]
    assert TrainState(step=9, row=bad).last_fit_step == 7 and TrainState(step=9).last_fit_step == 9
    entries = [Blocked("a", "d", 8, 0, number, 0, 5) for number in (0, 2, 1)]
    assert TrainState(blocklist=entries).rollbacks == 2 and TrainState().rollbacks == 0


# ---- metrics ----------------------------------------------------------------------------------------------------
def open_metrics(folder: Path, from_step: int = 0) -> Metrics:
    return Metrics(folder, from_step, total_steps=20, console=Console(file=io.StringIO(), width=100))


def write_steps(metrics: Metrics, first: int, last: int) -> None:
    for step in range(first, last + 1):
        metrics.write("train", step, {"loss": 5.0 / step, "grad_norm": 1.0})
        metrics.advance(step)
        if step % 5 == 0:
            metrics.write("eval", step, {"loss": 6.0 / step})


def steps_of(folder: Path, kind: str) -> list[int]:
    return [record["step"] for record in read_metrics(folder) if record["kind"] == kind]


@pytest.mark.parametrize("resume_from", [0, 5, 7, 10])
def test_no_step_twice_after_a_crash_and_a_resume(tmp_path: Path, resume_from: int) -> None:
    """Steps beyond the checkpoint were logged, and the last line was being written, when the process died."""
    died = open_metrics(tmp_path)
    write_steps(died, 1, 10)
    died._board.flush()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 11, "lo')
    resumed = open_metrics(tmp_path, from_step=resume_from)
    write_steps(resumed, resume_from + 1, 12)
    resumed.close()
    died.close()
    assert steps_of(tmp_path, "train") == list(range(1, 13))
    assert steps_of(tmp_path, "eval") == [5, 10]
    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 13))


def test_drop_after_keeps_whole_records_word_for_word(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"kind": "train", "step": step, "loss": 1 / 3, "note": "naïve\u2028"}) for step in range(1, 8)]
    path.write_text("\n".join([*lines[:3], '{"torn": ', *lines[3:], '{"kind": "tr']))
    drop_after(path, 5)
    assert path.read_text().splitlines() == lines[:5]
    assert list(tmp_path.iterdir()) == [path], "nothing is left beside it"
    drop_after(path, 5)
    assert path.read_text().splitlines() == lines[:5]


@given(st.integers(1, 400))
def test_a_line_torn_anywhere_costs_that_line_only(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    folder = tmp_path_factory.mktemp("torn")
    records = [{"kind": "train", "step": step, "loss": 1.5, "data": {"a": [1, None]}} for step in range(1, 6)]
    text = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(text[: len(text) - cut])
    kept = read_metrics(folder)
    assert kept == records[: len(kept)]
    assert len(kept) >= text[: len(text) - cut].count("\n")


def test_metrics_without_a_file(tmp_path: Path) -> None:
    assert read_metrics(tmp_path) == []
    drop_after(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_records_carry_time_and_are_there_before_closing(tmp_path: Path) -> None:
    metrics = open_metrics(tmp_path)
    metrics.write("event", 3, {"event": "saved", "seconds": 0.5})
    (record,) = read_metrics(tmp_path)
    metrics.close()
    assert record.pop("time") > 1.7e9
    assert record == {"kind": "event", "step": 3, "event": "saved", "seconds": 0.5}


def test_a_log_file_gets_one_line_a_report(tmp_path: Path) -> None:
    out = io.StringIO()
    with Metrics(tmp_path, 0, 10, Console(file=out, width=40)) as metrics:
        for step in range(1, 4):
            metrics.advance(step)
        metrics.show(3, "loss 5.0000  " + "x" * 60)
        metrics.say("saved [somewhere]/step-3")
    assert [line.split("  ")[0] for line in out.getvalue().splitlines()] == ["step 3", "saved [somewhere]/step-3"]


# ---- the picture ------------------------------------------------------------------------------------------------
def run_with(folder: Path, records: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def training(slope: float, **extra: Any) -> list[dict[str, Any]]:
    return [
        {"kind": "train", "step": s, "loss": 6 - slope * s, "grad_norm": 1.0, "lr": 1e-3 * s, **extra}
        for s in range(1, 40)
    ]


def picture(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_picture_shows_what_the_metrics_say(tmp_path: Path) -> None:
    """Each kind of record leaves its mark: the picture differs from the one without it."""

    def event(name: str) -> dict[str, Any]:
        return {"kind": "event", "step": 20, "event": name}

    heldout = [{"kind": "eval", "step": step, "loss": 4.0} for step in (10, 20, 30)]
    runs = {
        "base": training(0.1),
        "resumed": [*training(0.1), event("resumed")],
        "skipped": [*training(0.1), event("skipped")],
        "rolled_back": [*training(0.1), event("rolled_back")],
        "more": [*training(0.1, **{"layer_00/max_over_mean": 1.3}), *heldout],
        "unmarked": [event("started"), *training(0.1), event("saved")],  # no one asked for lines at these
    }
    pictures = {}
    for name, records in runs.items():
        folder = run_with(tmp_path / "run", records)  # one name: the title must not make the difference
        pictures[name] = picture(plot_run(folder))
        folder.rename(tmp_path / name)
    base = pictures["base"]
    assert min(base.shape[:2]) > 400
    assert len(np.unique(base.reshape(-1, 3), axis=0)) > 50, "an empty canvas has few colours"
    for name in ("resumed", "skipped", "rolled_back", "more"):
        assert (pictures[name] != base).any(axis=-1).mean() > 1e-4, name
    assert (pictures["resumed"] != pictures["skipped"]).any()
    assert (pictures["rolled_back"] != pictures["skipped"]).any()
    assert np.array_equal(pictures["unmarked"], base)


def test_picture_of_a_run_that_only_started(tmp_path: Path) -> None:
    assert picture(plot_run(run_with(tmp_path / "run", []))).std() > 0


def test_picture_passes_over_figures_that_are_no_numbers(tmp_path: Path) -> None:
    records = [*training(0.1), {"kind": "train", "step": 40, "loss": math.nan, "grad_norm": "inf", "lr": None}]
    assert picture(plot_run(run_with(tmp_path / "run", records))).std() > 0


# ---- signals ----------------------------------------------------------------------------------------------------
@pytest.fixture
def listening() -> Iterator[StopRequest]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        yield StopRequest().listen()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def send(number: int) -> None:
    """A real signal to this process; Python runs the handler before the next statement of the main thread."""
    assert threading.current_thread() is threading.main_thread()
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_a_signal_raises_the_flag_and_nothing_else(listening: StopRequest, number: signal.Signals) -> None:
    assert not listening and listening.name is None
    send(number)
    assert listening and listening.name == number.name


def test_a_stop_may_be_asked_for_again(listening: StopRequest) -> None:
    for _ in range(3):
        send(signal.SIGTERM)
        send(signal.SIGUSR1)
    assert listening.name == "SIGUSR1"
    send(signal.SIGINT)  # the first Ctrl-C is a request like any other
    assert listening.name == "SIGINT"


def test_second_ctrl_c_ends_at_once(listening: StopRequest) -> None:
    send(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)


def test_nobody_listens_unasked() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]
    StopRequest()
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
