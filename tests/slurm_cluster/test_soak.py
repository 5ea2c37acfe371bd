"""Killed again and again, to the last step: `make soak`, for many minutes."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from slurm.run_folder import read_decisions
from tests.slurm_cluster.cluster import ENDED, Slurm
from tests.slurm_cluster.tiny_run import Submitted, TinyRun

KILLS, STEPS = 20, 500


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_twenty_random_kills_of_ranks(slurm: Slurm, tiny: TinyRun, corpus: Path) -> None:
    """The weights are those of a run that nobody disturbed, to the bit."""
    seed = time.time_ns()
    print(f"seed {seed}")
    chance = random.Random(seed)
    submitted = Submitted(slurm, tiny, {"max_restarts": 99, "max_without_progress": 99})
    job = submitted.submit(f"train.steps={STEPS}")
    killed = 0
    while killed < KILLS and slurm.state(job) not in ENDED:
        wait_for_a_moment(submitted, chance)
        if ranks := submitted.rank_processes():
            before = slurm.restarts(job)
            slurm.run("kill", "-KILL", chance.choice(ranks), code=None)
            slurm.until(job, lambda: slurm.restarts(job) > before, "to be queued again")  # noqa: B023
            killed += 1
    submitted.until_done()
    assert killed == KILLS, f"only {killed} times, then it was done"
    assert sum(decision.requeue for decision in read_decisions(tiny.run)) >= KILLS
    submitted.check_whole(starts=tiny.starts())  # some were killed before they had become one

    calm = TinyRun.write(tiny.config.parent, corpus, "calm", steps=STEPS)
    job = slurm.job(*calm.command())
    assert slurm.wait(job) == "COMPLETED", slurm.log(job)
    assert tiny.losses() == calm.losses()
    assert tiny.weights() == calm.weights()


def wait_for_a_moment(submitted: Submitted, chance: random.Random) -> None:
    """Some are while the ranks start, most while they train."""
    submitted.slurm.until(submitted.job, lambda: bool(submitted.rank_processes()), "to start")
    if chance.random() < 0.25:
        time.sleep(chance.random() * 8)
        return
    steps = chance.randrange(1, 25)
    submitted.slurm.until(submitted.job, lambda: submitted.log_of_start().count("  loss ") >= steps, "to train")
    time.sleep(chance.random() * 0.3)
