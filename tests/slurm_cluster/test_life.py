"""A run that `glam submit` queued, through what befalls jobs on a cluster, to its last step.

Whatever happens, `check_whole` holds at the end: every step on record once, no damaged checkpoint, as many starts as
there should have been. Starts of four ranks are what takes the time, so no test makes more of them than it must.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest

from configs.errors import EXIT_FAILED
from slurm.run_folder import read_decisions
from tests.slurm_cluster.cluster import NODES, Slurm
from tests.slurm_cluster.tiny_run import GLAM, Submitted, TinyRun


@pytest.fixture
def submitted(slurm: Slurm, tiny: TinyRun) -> Submitted:
    """A run that goes on until it is told to end."""
    return Submitted(slurm, tiny)


def test_time_limit(submitted: Submitted) -> None:
    """SLURM's warning; save, requeue, resume, done."""
    submitted.submit()
    submitted.until_step(3)
    submitted.warn_once()
    submitted.end_soon()
    submitted.until_done()
    asked, done = read_decisions(submitted.run)
    assert (asked.cause, asked.requeue, asked.counted) == ("time_limit", True, False)
    assert (done.cause, done.requeue) == ("done", False)
    submitted.check_whole(starts=2)


def test_preemption(submitted: Submitted) -> None:
    """A job of a higher partition wants all nodes: save within the grace time, wait, resume."""
    submitted.site["partition"] = "low"
    submitted.submit()
    submitted.until_step(3)
    all_nodes = f"--nodes={len(NODES)}"
    urgent = submitted.slurm.sbatch("#!/bin/bash\nsleep 1\n", "--partition=high", all_nodes, "--exclusive")
    submitted.until_log("stopped after step")
    submitted.end_soon()
    submitted.slurm.wait(urgent, "COMPLETED")
    submitted.until_done()
    decision = read_decisions(submitted.run)[0]
    assert (decision.cause, decision.requeue, decision.counted) == ("preempted", True, False)
    assert f"stopped after step {decision.step} " in submitted.log()
    submitted.check_whole(starts=2)


def test_node_death(submitted: Submitted) -> None:
    """A node loses its power, for good: the run goes on on others."""
    submitted.submit()
    submitted.until_step(12)
    died = submitted.nodes()[1]
    submitted.slurm.kill_node(died)
    submitted.end_soon()
    submitted.until_done()
    assert died not in submitted.nodes()
    submitted.check_whole(starts=2)


def test_slurmstepd_death(submitted: Submitted) -> None:
    """SLURM's own process beside the ranks of a node. They live on; when they have ended srun would wait for ever."""
    submitted.submit("train.steps=120")
    submitted.until_step(12)
    submitted.slurm.kill_node(submitted.nodes()[1], "slurmstepd")
    submitted.until_done()
    assert "srun has not returned" in submitted.log()
    submitted.check_whole(starts=1)


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
