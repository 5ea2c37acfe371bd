"""A run that `glam submit` queued, through what befalls jobs on a cluster, to its last step.

Whatever happens, `check_whole` holds at the end: every step on record once, no damaged checkpoint, as many starts as
there should have been. Starts of four ranks are what takes the time, so no test makes more of them than it must.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path

import pytest

from configs.errors import EXIT_FAILED
from slurm.run_folder import read_decisions
from tests.slurm_cluster.cluster import NODES, Slurm
from tests.slurm_cluster.tiny_run import GLAM, Submitted, TinyRun

ALL_NODES = (f"--nodes={len(NODES)}", "--exclusive")


@pytest.fixture
def submitted(slurm: Slurm, tiny: TinyRun) -> Submitted:
    """A run that goes on until it is told to end."""
    return Submitted(slurm, tiny)


def test_time_limit_preemption_done(submitted: Submitted) -> None:
    """SLURM's warning; a job of a higher partition that wants all nodes: each time save, requeue, resume. On the last
    stretch SLURM's own process beside the ranks of a node is killed: they live on, and when they have ended srun would
    wait for ever."""
    submitted.site["partition"] = "low"
    submitted.submit()
    submitted.until_step(3)
    submitted.warn_once()
    submitted.until_start(2)
    submitted.until_step(submitted.tiny.steps()[-1] + 3)

    urgent = submitted.slurm.sbatch("#!/bin/bash\nsleep 1\n", "--partition=high", *ALL_NODES)
    submitted.until_decision(2)
    submitted.end_soon()
    submitted.slurm.wait(urgent, "COMPLETED")

    submitted.until_starting_up()
    submitted.slurm.kill_node(submitted.nodes()[1], "slurmstepd")
    submitted.until_done()
    assert "srun has not returned" in submitted.log_of_start()

    limit, preempted, done = read_decisions(submitted.run)
    assert (limit.cause, limit.requeue, limit.counted) == ("time_limit", True, False)
    assert (preempted.cause, preempted.requeue, preempted.counted) == ("preempted", True, False)
    assert (done.cause, done.requeue) == ("done", False)
    for stop in (limit, preempted):  # saved where it stopped
        assert f"stopped after step {stop.step} " in submitted.log()
    submitted.check_whole(starts=3)


def test_nodes_that_die(submitted: Submitted) -> None:
    """One before the ranks have met, and in such a way that neither SLURM nor the ranks notice: its slurmstepd and its
    ranks are gone, the node is not. A second one loses its power, for good: the run goes on on others."""
    submitted.site["ranks_per_node"] = 1  # enough, and quicker
    submitted.submit()
    submitted.until_starting_up()
    silent = submitted.nodes()[1]
    submitted.slurm.kill_node(silent, "slurmstepd")
    submitted.slurm.kill_node(silent, "tasks")
    began = time.monotonic()
    submitted.until_decision(1)
    assert time.monotonic() - began < 120  # half a minute of silence, the waits of the end; and a busy machine
    apart = submitted.slurm.has_networks  # else all is one host, whose processes the watch sees
    assert (f"on {silent}, is silent for" if apart else ", is gone without a word") in submitted.log()

    submitted.until_step(12)
    died = submitted.nodes()[1]
    submitted.slurm.kill_node(died)
    submitted.end_soon()
    submitted.until_done()
    assert died not in submitted.nodes()
    first, *_, done = read_decisions(submitted.run)  # the second may be SLURM's own, without a word of the script
    assert (first.cause, first.requeue, first.counted, done.cause) == ("killed", True, True, "done")
    assert not apart or f" on {silent} first" in first.reason
    submitted.check_whole(starts=2)


def test_crash_loop_ends(submitted: Submitted, tmp_path: Path) -> None:
    """A trainer that dies at once, of what nobody knows, is not started for ever."""
    broken = tmp_path / "python"
    broken.write_text(f'#!/bin/sh\ncase "$*" in *main.py*) exit 7 ;; esac\nexec {shlex.quote(sys.executable)} "$@"\n')
    broken.chmod(0o755)
    submitted.site |= {"python": str(broken), "max_without_progress": 3}
    job = submitted.submit()
    assert submitted.slurm.wait(job) == "FAILED"
    assert submitted.slurm.facts(job)["ExitCode"] == f"{EXIT_FAILED}:0"
    decisions = read_decisions(submitted.run)
    assert [decision.requeue for decision in decisions] == [True, True, False], submitted.log()
    assert "max_without_progress" in decisions[-1].reason


@pytest.mark.slow
def test_cancelled(submitted: Submitted) -> None:
    """scancel: saved within SLURM's KillWait, and it does not come back. `glam submit` goes on."""
    job = submitted.submit()
    submitted.until_step(3)
    submitted.slurm.cancel(job)
    assert submitted.slurm.wait(job) == "CANCELLED" and submitted.slurm.restarts(job) == 0
    stopped_at = submitted.tiny.steps()[-1]
    assert f"stopped after step {stopped_at} " in submitted.log()
    assert submitted.tiny.saved_steps()[-1] == stopped_at

    submitted.submit(f"train.steps={stopped_at + 20}")
    submitted.until_done()
    submitted.check_whole(starts=2)


def test_two_incarnations(submitted: Submitted) -> None:
    """Nodes are cut off from SLURM, not from the disk: it starts the run elsewhere while the older start goes on."""
    if not submitted.slurm.has_networks:
        pytest.skip("nodes without networks of their own cannot be cut off")
    submitted.site["ranks_per_node"] = 1  # there will be twice as many at a time
    job = submitted.submit("train.save_every_steps=50")  # the older start hears of the newer one when it saves
    submitted.until_step(52)
    old = submitted.nodes()
    for node in old:
        submitted.slurm.cut_node(node)
    submitted.slurm.until(job, lambda: submitted.tiny.starts() == 2, "to start elsewhere")
    assert not set(old) & set(submitted.nodes())
    submitted.until_log("was started again")  # says the older one, and ends
    for node in old:
        submitted.slurm.mend_node(node)
    submitted.slurm.run(*GLAM, "stop", submitted.run)
    assert submitted.slurm.wait(job) == "COMPLETED", submitted.log()
    submitted.tiny.check_whole(submitted.tiny.steps()[-1])
    assert submitted.tiny.starts() == 2 and submitted.slurm.restarts(job) == 1, submitted.log()
