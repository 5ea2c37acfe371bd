"""Whether a job goes on by itself: the rule as a table and as properties, and what it reads and writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pretrain.checkpoint_folders import checkpoint_name
from pretrain.status import RankStatus as Writer
from pretrain.status import mark_done
from slurm import run_folder
from slurm.run_folder import Decision, RankStatus
from slurm.verdict import REMEDIES, Ending, JobState, Limits, decide, main

LIMITS = Limits(max_restarts=3, max_without_progress=2)
PLAIN = Ending(False, False, 1, None, JobState(), (), 100, ())
CAUSES = ["out_of_memory", "nan", "node", "disk", "configuration", "hang", "interrupted", "unknown", None]


def rank(state: str, cause: str | None = None, number: int = 0, time: float = 0.0, detail: str = "") -> RankStatus:
    return RankStatus(number, state, start=1, host="n", step=7, cause=cause, detail=detail, time=time)


def past(cause: str = "node", step: int | None = 100, counted: bool = True) -> Decision:
    return Decision(0.0, "1", 1, cause, "", step, True, counted)


STOPPED, FAILED, RUNNING, DONE = rank("stopped"), rank("failed", "node"), rank("running"), rank("done")


@pytest.mark.parametrize(
    ("changes", "requeue", "cause", "counted"),
    [
        # markers outweigh all
        ({"done": True, "code": 143, "ranks": (FAILED,)}, False, "done", False),
        ({"done": True, "signal": "USR1", "stop": True}, False, "done", False),
        ({"stop": True, "code": 3, "ranks": (STOPPED,)}, False, "stop", False),
        ({"ranks": (DONE, DONE), "code": 0}, False, "done", False),  # DONE not seen yet over a network
        # stops
        ({"code": 3, "ranks": (STOPPED, STOPPED)}, True, "stopped", False),
        ({"code": 143, "ranks": (STOPPED, STOPPED)}, True, "stopped", False),  # srun -K
        ({"code": 3}, True, "stopped", False),
        ({"code": 143, "signal": "USR1", "ranks": (STOPPED,)}, True, "time_limit", False),
        ({"code": 137, "signal": "USR1", "ranks": (RUNNING,)}, True, "time_limit", False),  # did not save in time
        ({"code": 143, "slurm": JobState(timed_out=True)}, True, "time_limit", False),
        ({"code": 143, "slurm": JobState(preempted=True)}, True, "preempted", False),  # while starting up
        ({"code": 0, "slurm": JobState(preempted=True)}, True, "preempted", False),
        ({"code": 143, "signal": "TERM", "ranks": (STOPPED,)}, True, "preempted", False),
        # SLURM ends the job itself: scancel, or a requeue of its own
        ({"code": 3, "signal": "TERM", "slurm": JobState(leaving=True)}, False, "interrupted", False),
        ({"code": 3, "signal": "USR1", "slurm": JobState(leaving=True)}, True, "time_limit", False),
        # what would come again, also while a signal was on its way
        *[({"code": 0, "ranks": (rank("failed", cause), STOPPED)}, False, cause, True) for cause in REMEDIES],
        ({"signal": "USR1", "ranks": (rank("failed", "disk"),)}, False, "disk", True),
        ({"code": 2}, False, "configuration", True),
        # faults
        ({"ranks": (FAILED, RUNNING)}, True, "killed", True),
        ({"ranks": (FAILED, rank("failed"))}, True, "node", True),
        ({"ranks": (rank("failed"), rank("failed", "hang", 1))}, True, "hang", True),
        ({"code": 0, "ranks": (RUNNING, RUNNING)}, True, "killed", True),  # srun says 0 after a node failure
        ({"code": 0}, True, "unknown", True),
        ({"code": 137}, True, "unknown", True),
        ({"ranks": (STOPPED, FAILED)}, True, "node", True),
        ({"before": (past(), past(), past())}, False, "unknown", True),  # three restarts
        ({"step": 200, "before": (past(), past())}, True, "unknown", True),
        ({"before": (past(),)}, False, "unknown", True),  # twice at step 100
        ({"before": (past(step=50),)}, True, "unknown", True),
        ({"before": (past("preempted", counted=False),)}, True, "unknown", True),
        ({"step": None, "before": (past(step=None),)}, False, "unknown", True),
        # stops use up nothing, but time limits without a step between them end
        ({"code": 3, "before": (past(),) * 9}, True, "stopped", False),
        ({"signal": "USR1", "before": (past("time_limit", counted=False),)}, False, "time_limit", False),
        ({"signal": "TERM", "before": (past("preempted", counted=False),) * 9}, True, "preempted", False),
        # two of one run
        ({"starts": 2, "ranks": (FAILED,)}, False, "taken_over", False),
        ({"starts": 2, "code": 3}, False, "taken_over", False),
        ({"restarts": 0, "slurm": JobState(restarts=1)}, False, "taken_over", False),
        ({"restarts": 1, "slurm": JobState(restarts=1), "code": 3}, True, "stopped", False),
        ({"ranks": (rank("failed", "interrupted"), rank("failed"))}, False, "taken_over", False),
    ],
)  # fmt: skip
def test_the_rule(changes: dict[str, Any], requeue: bool, cause: str, counted: bool) -> None:
    verdict = decide(replace(PLAIN, **changes), LIMITS)
    assert (verdict.requeue, verdict.cause, verdict.counted) == (requeue, cause, counted), verdict.reason
    assert verdict.reason and "\n" not in verdict.reason
    assert verdict.exit_code == (0 if requeue else 10 if cause in ("done", "stop") else 11)


def test_the_rank_that_knows_the_cause_is_named() -> None:
    first = rank("failed", "out_of_memory", 5, time=9.0, detail="CUDA out of memory\n  tried 2 GiB")
    verdict = decide(replace(PLAIN, ranks=(rank("failed", "node", 0, time=1.0), first)), LIMITS)
    assert (
        "rank 5 on n at step 7: CUDA out of memory tried 2 GiB" in verdict.reason and "micro-batches" in verdict.reason
    )


ranks = st.builds(rank, st.sampled_from(["running", "done", "stopped", "failed"]), st.sampled_from(CAUSES))
decisions = st.builds(
    past, st.sampled_from(["node", "time_limit", "stopped"]), st.sampled_from([None, 100, 200]), st.booleans()
)
endings = st.builds(
    Ending,
    done=st.booleans(),
    stop=st.booleans(),
    code=st.integers(0, 255),
    signal=st.sampled_from([None, "USR1", "TERM"]),
    slurm=st.builds(JobState, st.booleans(), st.booleans(), st.booleans()),
    ranks=st.lists(ranks, max_size=4).map(tuple),
    step=st.sampled_from([None, 100, 200]),
    before=st.lists(decisions, max_size=6).map(tuple),
)
limits = st.builds(Limits, st.integers(0, 4), st.integers(1, 4))


@given(endings, limits)
def test_what_always_holds(ending: Ending, bounds: Limits) -> None:
    verdict = decide(ending, bounds)
    assert not (verdict.requeue and (ending.done or ending.stop))
    assert not (verdict.requeue and verdict.cause in REMEDIES)
    faults = sum(decision.counted for decision in ending.before)
    assert not (verdict.requeue and verdict.counted and faults >= bounds.max_restarts)
    if any(r.state == "failed" and r.cause in REMEDIES for r in ending.ranks):
        assert not verdict.requeue
    assert decide(ending, bounds) == verdict


@given(st.lists(endings, max_size=30), limits)
def test_no_history_goes_beyond_the_budget(life: list[Ending], bounds: Limits) -> None:
    """A job that obeys is started again after faults at most max_restarts times, however it ends each time."""
    before: tuple[Decision, ...] = ()
    for ending in life:
        verdict = decide(replace(ending, before=before), bounds)
        if not verdict.requeue:
            break
        before += (Decision(0.0, "1", 1, verdict.cause, "", ending.step, True, verdict.counted),)
    assert sum(decision.counted for decision in before) <= bounds.max_restarts


@given(st.integers(1, 5))
def test_a_crash_at_the_same_place_ends(bound: int) -> None:
    before: tuple[Decision, ...] = ()
    while (verdict := decide(replace(PLAIN, before=before), Limits(99, bound))).requeue:
        before += (past(),)
    assert len(before) == bound - 1 and "max_without_progress" in verdict.reason


# ---- what SLURM says ------------------------------------------------------------------------------------------------
JOB = (
    "JobId=4 JobName=tiny UserId=root(0) JobState={} Reason=None Requeue=1 Restarts=2 RunTime={} TimeLimit=00:10:00 {}"
)


@pytest.mark.parametrize(
    ("line", "state"),
    [
        (JOB.format("RUNNING", "00:00:12", "PreemptTime=None"), JobState(restarts=2)),
        (JOB.format("RUNNING", "00:00:12", "PreemptTime=2026-11-26T03:38:32"), JobState(preempted=True, restarts=2)),
        (JOB.format("COMPLETING", "00:00:12", ""), JobState(leaving=True, restarts=2)),  # scancel, lost node
        (JOB.format("COMPLETING", "00:10:12", ""), JobState(timed_out=True, restarts=2)),
        (JOB.format("PENDING", "00:00:00", ""), JobState(leaving=True, restarts=2)),
        (JOB.format("COMPLETING", "1-00:00:00", ""), JobState(timed_out=True, restarts=2)),
        ("", JobState()),
        ("slurm_load_jobs error: Unable to contact slurm controller", JobState()),
        ("JobState=COMPLETING RunTime=00:10:12 TimeLimit=UNLIMITED", JobState(leaving=True)),
    ],
)
def test_reading_scontrol(line: str, state: JobState) -> None:
    """Lines as SLURM 22.05 wrote them in these situations."""
    assert JobState.read(line) == state


@given(st.text())
def test_any_answer_of_scontrol_is_read(text: str) -> None:
    JobState.read(text)


# ---- the run folder -------------------------------------------------------------------------------------------------
def arguments(run: Path, code: int = 1, after: int = 0, **more: str) -> list[str]:
    options = {"job": "7", "code": str(code), "after": f"{after:06d}", "since": "0", "max-restarts": "2",
               "max-without-progress": "2", **more}  # fmt: skip
    return [str(run), *(word for name, value in options.items() for word in (f"--{name}", value))]


def start(run: Path, number: int) -> None:
    (run / "starts").mkdir(exist_ok=True)
    (run / "starts" / f"{number:06d}.json").write_text("{}")


def test_what_the_trainer_writes_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Names and fields are those of pretrain, which this room may not import."""
    start(tmp_path, 1)
    Writer(tmp_path, 3, start=1, step=12).write("failed", "disk", "no space left")
    (tmp_path / "checkpoints" / checkpoint_name(10)).mkdir(parents=True)
    (tmp_path / "checkpoints" / (checkpoint_name(11) + ".partial-1")).mkdir()
    assert main(arguments(tmp_path)) == 11
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith("ended: disk: rank 3 on ") and "step 12: no space left" in said
    (decision,) = run_folder.read_decisions(tmp_path)
    assert (decision.job, decision.code, decision.cause, decision.step, decision.requeue) == ("7", 1, "disk", 10, False)
    mark_done(tmp_path, 12)
    assert main(arguments(tmp_path)) == 10


def test_older_starts_say_nothing_of_this_one(tmp_path: Path) -> None:
    Writer(tmp_path, 0, start=1).write("failed", "nan", "old")
    start(tmp_path, 1)
    assert main(arguments(tmp_path, after=1)) == 0
    assert run_folder.read_decisions(tmp_path)[-1].cause == "unknown"
    start(tmp_path, 2)
    Writer(tmp_path, 0, start=2).write("failed", "nan", "new")
    assert main(arguments(tmp_path, after=1)) == 11


def test_a_rank_that_failed_before_its_start_had_a_number(tmp_path: Path) -> None:
    Writer(tmp_path, 0).write("failed", "configuration", "early")
    assert main(arguments(tmp_path)) == 11 and run_folder.read_decisions(tmp_path)[-1].cause == "configuration"
    assert main(arguments(tmp_path, job="8", since="99999999999")) == 0  # one of long ago


def test_each_job_has_a_budget_of_its_own(tmp_path: Path) -> None:
    def end(job: str, step: int) -> int:
        (tmp_path / "checkpoints" / checkpoint_name(step)).mkdir(parents=True)
        return main(arguments(tmp_path, job=job))

    assert [end("1", 10), end("1", 20), end("1", 30), end("2", 40)] == [0, 0, 11, 0]


def test_broken_files_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "ranks").mkdir()
    for number, text in enumerate(["", "{", "[]", '{"rank": "x"}', '{"rank": 1}', "\x00", '{"rank":4,"state":7}']):
        (tmp_path / "ranks" / f"rank-{number:05d}.json").write_text(text)
    (tmp_path / "restarts.jsonl").write_text('{"job": "7"}\nnonsense\n[1]\n')
    assert main(arguments(tmp_path)) == 0
    assert len(run_folder.read_decisions(tmp_path)) == 1


def test_without_a_record_no_fault_is_forgiven(tmp_path: Path) -> None:
    (tmp_path / "restarts.jsonl").mkdir()  # also root cannot append to that
    assert main(arguments(tmp_path)) == 11
    assert main(arguments(tmp_path, code=3)) == 0  # a stop uses up nothing


def test_records_are_lines_of_json(tmp_path: Path) -> None:
    main(arguments(tmp_path))
    main(arguments(tmp_path, code=3))
    lines = [json.loads(line) for line in (tmp_path / "restarts.jsonl").read_text().splitlines()]
    assert [line["cause"] for line in lines] == ["unknown", "stopped"]
    assert set(lines[0]) == {"time", "job", "code", "cause", "reason", "step", "requeue", "counted"}
