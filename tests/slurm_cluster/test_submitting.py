"""`glam submit` on a real SLURM: its refusals, the launchers, a corpus, and `glam stop` and `glam status` beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from slurm.run_folder import read_decisions, read_ranks
from tests.data_prep.mixed import tree_hashes
from tests.slurm_cluster.cluster import NODES, Slurm
from tests.slurm_cluster.tiny_run import GLAM, Submitted, TinyRun


@pytest.fixture
def submitted(slurm: Slurm, tiny: TinyRun) -> Submitted:
    return Submitted(slurm, tiny)


def cluster_file(folder: Path, **changes: object) -> Path:
    file = folder / "site.yaml"
    file.write_text(yaml.safe_dump({"ranks_per_node": 2, "time_limit": "10", "warning_s": 60, **changes}))
    return file


def test_refused_before_anything_is_queued(slurm: Slurm, tiny: TinyRun, tmp_path: Path) -> None:
    def refusal(*words: str, **site: object) -> str:
        given = ("--cluster", cluster_file(tmp_path, **site), *words)
        return slurm.run(*GLAM, "submit", tiny.config, *given, code=2)

    assert "did you mean 'batch'" in refusal(partition="bacth")
    nodes = 2 * len(NODES)
    assert f"{nodes} nodes; partition batch has {len(NODES)}" in refusal(
        "--nodes", str(nodes), "train.batch_tokens=2048"
    )
    assert "sbatch refuses" in refusal(sbatch_options=["--constraint=none"])
    assert not list(tiny.run.glob("submits/*"))
    assert slurm.run("squeue", "-h") == ""


@pytest.mark.slow
def test_stopped_while_it_trains(submitted: Submitted) -> None:
    slurm, run = submitted.slurm, submitted.run
    job = submitted.submit()
    given = ("--cluster", submitted.tiny.config.with_name("cluster.yaml"))
    assert f"job {job} of {run} is" in slurm.run(*GLAM, "submit", submitted.tiny.config, *given, code=2)
    submitted.until_step(3)
    found = json.loads(slurm.run(*GLAM, "status", run, "--json"))
    assert [(one["id"], one["state"]) for one in found["jobs"]] == [(str(job), "RUNNING")]
    assert found["step"] >= 3 and found["steps"] == 100000 and found["ranks"] == {"running": 4}
    assert "saves after its present step" in slurm.run(*GLAM, "stop", run)
    assert slurm.wait(job) == "COMPLETED" and slurm.restarts(job) == 0, submitted.log()
    assert [decision.cause for decision in read_decisions(run)] == ["stop"]
    assert submitted.tiny.saved_steps()[-1] == submitted.tiny.steps()[-1]
    found = json.loads(slurm.run(*GLAM, "status", run, "--json"))
    assert found["jobs"] == [] and found["stop"] and found["ranks"] == {"stopped": 4} and found["last_failure"] is None


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_under_the_launchers(submitted: Submitted, launcher: str) -> None:
    """Warned, saved, queued again, done: USR1 ends neither launcher."""
    submitted.site["launcher"] = launcher
    submitted.submit()
    submitted.until_step(3)
    submitted.warn_once()
    submitted.end_soon()
    submitted.until_done()
    assert [decision.cause for decision in read_decisions(submitted.run)] == ["time_limit", "done"], submitted.log()
    submitted.check_whole(starts=2)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "torchrun", "deepspeed"])
def test_a_launcher_is_killed(submitted: Submitted, launcher: str) -> None:
    """Of all ranks, or of those on the node of rank 0. The ranks themselves are unharmed."""
    submitted.site["launcher"] = launcher
    submitted.submit()
    submitted.until_step(12)
    rank_0 = read_ranks(submitted.run)[0].pid
    pattern = "^srun .*job.sbatch task"
    launchers = submitted.slurm.run(
        *(("pgrep", "-f", pattern) if launcher == "srun" else ("ps", "-o", "ppid=", rank_0))
    )
    submitted.slurm.run("kill", "-KILL", *launchers.split())
    submitted.until_decision(1)
    assert read_decisions(submitted.run)[0].requeue, submitted.log()
    submitted.end_soon()
    submitted.until_done()
    submitted.check_whole(starts=2)


@pytest.mark.slow
def test_a_corpus(slurm: Slurm, corpus: Path, tmp_path: Path) -> None:
    """MPI ranks over two nodes; the bytes are those of one process."""
    given = ("--prep", "--nodes", "2", "--cluster", cluster_file(tmp_path), f"output={tmp_path}/out")
    said = slurm.run(*GLAM, "submit", corpus / "corpus.yaml", *given)
    job = int(said.split()[1])
    assert slurm.wait(job) == "COMPLETED", slurm.log(job)
    assert tree_hashes(tmp_path / "out") == tree_hashes(corpus)
