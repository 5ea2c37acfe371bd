"""The shell of a training job: traps, waits, the verdict asked and obeyed.

Real bash runs the real script here, and the real verdict and watch; srun, scontrol, squeue and scancel are stand-ins of
a few lines. How SLURM itself behaves is for tests/slurm_cluster, which runs the real one.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from slurm.render import render_prep, render_training
from tests.slurm.plans import ROOT, make_plan, stub

# The "ranks": a script that the stand-in of srun runs. USR1 comes by scancel, as to the tasks of a step.
SRUN = """trap 'kill -TERM $child 2>/dev/null' TERM
echo $$ > "$STUB/srun.pid"
bash "$STUB/ranks" & child=$!
echo $child > "$STUB/ranks.pid"
while wait $child; code=$?; kill -0 $child 2>/dev/null; do :; done
wait $child"""
SCANCEL = """echo "scancel $*" >> "$STUB/calls"
case $1 in --signal=USR1) kill -USR1 "$(cat "$STUB/ranks.pid")" ;; *) kill -KILL "$(cat "$STUB/ranks.pid")" ;; esac"""
SCONTROL = """echo "scontrol $1" >> "$STUB/calls"
case $1 in
show) cat "$STUB/job" ;;
requeue) (sleep 0.3; kill -TERM "$PPID") & ;; # as SLURM ends a script that it queues again
esac"""
SQUEUE = "echo 7.batch; echo 7.0; echo 7.extern"
RUNNING = "JobId=7 JobName=tiny JobState=RUNNING Restarts=0 RunTime=00:00:05 TimeLimit=00:10:00 PreemptTime=None"


class Job:
    """One start of a job under stand-ins."""

    def __init__(self, folder: Path, **site: object) -> None:
        self.run, self.bin, self.log = folder / "run", folder / "bin", folder / "log"
        plan = make_plan(folder, **site)  # type: ignore[arg-type]
        plan.submit_dir.mkdir(parents=True)
        (plan.submit_dir / "code").symlink_to(ROOT)
        plan.script.write_text(render_training(plan))
        self.script, self.started = plan.script, list[subprocess.Popen[str]]()
        for name, body in {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL, "squeue": SQUEUE}.items():
            stub(self.bin, name, body)
        self.slurm_says(RUNNING)

    def ranks(self, body: str) -> None:
        """What all ranks together do."""
        (self.bin / "ranks").write_text(
            f'status() {{ mkdir -p "$RUN/ranks"; echo "$1" > "$RUN/ranks/rank-00000.json"; }}\n{body}\n'
        )

    def slurm_says(self, line: str) -> None:
        (self.bin / "job").write_text(line)

    def start(self, **environ: str) -> subprocess.Popen[str]:
        known = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "STUB": str(self.bin), "RUN": str(self.run)}
        path = {"PATH": f"{self.bin}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
        self.started.append(
            subprocess.Popen(
                ["bash", str(self.script)],
                env=known | path | environ,
                text=True,
                start_new_session=True,
                stdout=self.log.open("w"),
                stderr=subprocess.STDOUT,
            )
        )
        return self.started[-1]

    def end(self, timeout_s: float = 60, **environ: str) -> tuple[int, str]:
        process = self.started[-1] if self.started and self.started[-1].poll() is None else self.start(**environ)
        # Not for the end of its output: what the script leaves behind, SLURM would end.
        return process.wait(timeout_s), self.log.read_text()

    def close(self) -> None:
        for process in self.started:  # each a session of its own: whatever is left of it
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 20
        while not true():
            assert time.monotonic() < deadline
            time.sleep(0.05)

    @property
    def calls(self) -> list[str]:
        path = self.bin / "calls"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def decisions(self) -> list[dict[str, object]]:
        path = self.run / "restarts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    with contextlib.closing(Job(tmp_path, kill_wait_s=1, max_restarts=2)) as made:
        yield made


def wait_for_ranks(job: Job) -> None:
    job.until(lambda: (job.run / "ready").exists())


LISTEN = 'trap "echo asked; echo > $RUN/asked; exit 3" USR1; touch "$RUN/ready"; while :; do sleep 0.1; done'


def test_done(job: Job) -> None:
    job.ranks('touch "$RUN/DONE"')
    code, said = job.end()
    assert code == 0 and "ended: the run is done" in said and "scontrol requeue" not in job.calls
    assert "Killed" not in said, said  # bash's word for the watch that is no longer needed


@pytest.mark.parametrize("marker", ["DONE", "STOP"])
def test_a_run_with_a_marker_is_not_started(job: Job, marker: str) -> None:
    (job.run / marker).touch()
    code, said = job.end()
    assert code == 0 and f"/{marker} is there" in said and not (job.bin / "srun.pid").exists()


def test_warned_of_the_limit(job: Job) -> None:
    job.ranks(LISTEN)
    process = job.start()
    wait_for_ranks(job)
    process.send_signal(signal.SIGUSR1)
    process.send_signal(signal.SIGUSR1)  # may come twice
    code, said = job.end()
    assert code == -signal.SIGTERM  # SLURM's, after the requeue
    assert "got USR1" in said and said.count("asked") >= 1
    assert job.calls[0] == "scancel --signal=USR1 7" and "scontrol requeue" in job.calls
    assert [(d["cause"], d["requeue"], d["counted"]) for d in job.decisions] == [("time_limit", True, False)]


def test_preempted(job: Job) -> None:
    """Whoever ends in the grace time, with whatever exit code, ends the job for good unless it is queued again."""
    job.ranks(LISTEN)
    process = job.start()
    wait_for_ranks(job)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)
    job.end()
    assert "scontrol requeue" in job.calls and job.decisions[0]["cause"] == "preempted"


def test_cancelled_by_hand_it_is_not_queued_again(job: Job) -> None:
    """`scontrol requeue` would bring it back, also then (seen on the real one)."""
    job.ranks(LISTEN)
    process = job.start()
    wait_for_ranks(job)
    job.slurm_says(RUNNING.replace("JobState=RUNNING", "JobState=COMPLETING"))
    process.send_signal(signal.SIGTERM)
    code, said = job.end()
    assert code == 1 and "SLURM itself ends this job" in said and "scontrol requeue" not in job.calls


def test_asked_to_stop(job: Job) -> None:
    job.ranks('touch "$RUN/STOP"; exit 3')
    code, said = job.end()
    assert code == 0 and "RUN/STOP" in said and "scontrol requeue" not in job.calls


def test_ranks_that_do_not_hear_at_first_are_told_again(job: Job) -> None:
    job.ranks('trap "" USR1; touch "$RUN/ready"; sleep 3; ' + LISTEN)
    process = job.start()
    wait_for_ranks(job)
    process.send_signal(signal.SIGUSR1)
    _, said = job.end()
    assert "asked" in said and job.calls.count("scancel --signal=USR1 7") == 2


def test_ranks_that_do_not_save_in_time_are_given_up(job: Job) -> None:
    """Before the limit comes, after which SLURM queues nothing again."""
    job.script.write_text(job.script.read_text().replace("GIVE_UP_S=15", "GIVE_UP_S=5"))
    job.ranks('trap "" USR1; touch "$RUN/ready"; while :; do sleep 0.1; done')
    process = job.start()
    wait_for_ranks(job)
    process.send_signal(signal.SIGUSR1)
    _, said = job.end()
    assert "have not saved and stopped within 5 s" in said and "scancel 7.0" in job.calls
    assert not {"scancel 7.batch", "scancel 7.extern"} & set(job.calls)
    assert job.decisions[0]["cause"] == "time_limit" and "scontrol requeue" in job.calls


def test_a_crash_is_started_again_until_it_repeats_itself(job: Job) -> None:
    job.ranks("exit 1")
    ends = [job.end()]
    job.slurm_says(RUNNING.replace("Restarts=0", "Restarts=1"))
    ends.append(job.end(SLURM_RESTART_COUNT="1"))
    job.slurm_says(RUNNING.replace("Restarts=0", "Restarts=2"))
    ends.append(job.end(SLURM_RESTART_COUNT="2"))
    assert [code for code, _ in ends] == [-signal.SIGTERM, -signal.SIGTERM, 1]
    assert "2 restart(s) after faults are used up" in ends[-1][1]


def test_a_configuration_that_cannot_work_is_not_tried_again(job: Job) -> None:
    job.ranks("echo 'found: x'; exit 2")
    code, said = job.end()
    assert code == 1 and "ended: configuration" in said and "scontrol requeue" not in job.calls


def test_srun_that_outlives_its_ranks_is_ended(job: Job) -> None:
    """As after a slurmstepd was killed: the ranks say they have failed, srun says nothing."""
    job.ranks('status \'{"rank": 0, "state": "failed", "start": 1, "cause": "node", "detail": "lost"}\'\n'
              'mkdir -p "$RUN/starts"; echo {} > "$RUN/starts/000001.json"; while :; do sleep 0.1; done')  # fmt: skip
    code, said = job.end()
    assert code == -signal.SIGTERM
    assert (
        "rank 0 has failed, and for 1 s srun has not returned: ending the step" in said and "scancel 7.0" in job.calls
    )
    assert job.decisions[0]["cause"] == "node" and job.decisions[0]["counted"] is True


def test_without_python_there_is_a_budget_still(tmp_path: Path) -> None:
    with contextlib.closing(Job(tmp_path, python="/no/such/python", max_restarts=2)) as job:
        job.ranks("exit 1")
        code, said = job.end(SLURM_RESTART_COUNT="1")
        assert "no verdict could be had" in said and "scontrol requeue" in job.calls and code == -signal.SIGTERM
        code, said = job.end(SLURM_RESTART_COUNT="2")
        assert code == 1 and job.calls.count("scontrol requeue") == 1


def test_prep_is_queued_again_when_warned(job: Job, tmp_path: Path) -> None:
    job.script.write_text(render_prep(make_plan(tmp_path)))
    job.ranks('trap "" USR1; touch "$RUN/ready"; while :; do sleep 0.1; done')
    process = job.start()
    wait_for_ranks(job)
    process.send_signal(signal.SIGUSR1)
    job.end()
    assert "scancel 7.0" in job.calls and "scontrol requeue" in job.calls


def test_prep_that_fails_ends(job: Job, tmp_path: Path) -> None:
    job.script.write_text(render_prep(make_plan(tmp_path)))
    job.ranks("exit 2")
    code, said = job.end()
    assert code == 1 and "failed (exit code 2)" in said and "scontrol requeue" not in job.calls
