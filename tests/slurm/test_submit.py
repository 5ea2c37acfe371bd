"""What is asked of SLURM's programs and how their answers are read. Acting is for tests/slurm_cluster: a real SLURM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from configs.run import RunConfig
from configs.site import SiteConfig
from slurm import submit
from slurm.environ import outside_environment, submitted
from slurm.nodes import Nodes, nodes_for
from slurm.submit import Job, Partition

# As SLURM 22.05 answers sinfo --format=%P|%F|%a|%l.
SINFO = "batch*|0/2/0/2|up|infinite\nshort|1/3/0/4|up|30:00\nbig|0/60/4/64|up|2-00:00:00\nold|0/0/8/8|down|infinite\n"


def site(**changes: Any) -> SiteConfig:
    return SiteConfig.check({"ranks_per_node": 2, "time_limit": "60", **changes}, where="test")


def test_partitions_are_read() -> None:
    assert submit.read_partitions(SINFO) == [
        Partition("batch", True, 2, True, None),
        Partition("short", False, 4, True, 1800),
        Partition("big", False, 64, True, 172800),
        Partition("old", False, 8, False, None),
    ]


@pytest.mark.parametrize(
    ("changes", "nodes", "found", "remedy"),
    [
        ({"partition": "bacth"}, 1, "partition 'bacth'", "did you mean 'batch'? There are: batch, short, big, old"),
        ({"partition": "gpu"}, 1, "partition 'gpu'", "there are: batch"),
        ({}, 3, "3 nodes; partition batch has 2", "--nodes 2, or partition short or big or old"),
        ({"partition": "big"}, 65, "65 nodes; partition big has 64", "--nodes 64"),
        ({"partition": "old"}, 1, "old is not up", "sinfo"),
        ({"partition": "short"}, 1, "time_limit 60; jobs of partition short end after 1800 s", "shorter time_limit"),
    ],
)
def test_what_would_wait_for_ever_is_refused(changes: dict[str, Any], nodes: int, found: str, remedy: str) -> None:
    with pytest.raises(UserError) as met:
        submit.check_partition(site(**changes), nodes, submit.read_partitions(SINFO))
    assert found in met.value.found and remedy in met.value.remedy


def test_what_fits_passes() -> None:
    partitions = submit.read_partitions(SINFO)
    submit.check_partition(site(), 2, partitions)
    submit.check_partition(site(partition="big"), 64, partitions)
    with pytest.raises(UserError, match="no default one"):
        submit.check_partition(site(), 1, [p for p in partitions if not p.is_default])


@pytest.mark.parametrize(("answer", "job"), [("12\n", "12"), ("12;lab\n", "12"), ("sbatch: a word\n13\n", "13")])
def test_the_number_of_a_job_is_read(answer: str, job: str) -> None:
    assert submit.read_job_id(answer) == job


@pytest.mark.parametrize("answer", ["", "\n", "Submitted batch job", "12a"])
def test_other_answers_are_told(answer: str) -> None:
    with pytest.raises(UserError):
        submit.read_job_id(answer)


def test_jobs_are_read() -> None:
    answer = "7|RUNNING|tiny|node[1-2]\n8|COMPLETED|tiny|None\n9|PENDING|a b|(Resources)\n10|COMPLETING|c|n|1\n\n"
    assert submit.read_jobs(answer) == [
        Job("7", "RUNNING", "tiny", "node[1-2]"),
        Job("9", "PENDING", "a b", "(Resources)"),
        Job("10", "COMPLETING", "c", "n|1"),
    ]


def test_arguments() -> None:
    assert submit.sbatch_arguments(Path("/r/job.sbatch")) == ["sbatch", "--parsable", "/r/job.sbatch"]
    assert submit.squeue_arguments(["7", "8"])[2] == "--jobs=7,8"
    assert submit.stop_arguments(Job("7", "RUNNING", "n", "")) == ["scancel", "--signal=USR1", "7"]
    assert submit.stop_arguments(Job("7", "PENDING", "n", "")) == ["scancel", "7"]


def test_without_slurm_it_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for act in (submit.require, submit.partitions, lambda: submit.find_jobs(["1"]), lambda: submit.submit(tmp_path)):
        with pytest.raises(UserError, match="on this machine"):
            act()
    assert submit.find_jobs([]) == []


def test_no_variable_outranks_the_script() -> None:
    given = {"SBATCH_PARTITION": "x", "SLURM_NTASKS": "9", "SLURM_JOB_ID": "1", "SLURM_CONF": "/c", "HOME": "/h"}
    assert outside_environment(given) == {"SLURM_CONF": "/c", "HOME": "/h"}
    assert submitted({"GLAM_SUBMIT": "/r"}) and not submitted({})


# ---- how many nodes -------------------------------------------------------------------------------------------------
def run(parallel: dict[str, Any], **train: Any) -> RunConfig:
    config = RunConfig.load(Path(__file__).resolve().parents[2] / "configs" / "demo.yaml")
    tree = config.model_dump(mode="json")
    tree["parallel"] = parallel
    tree["train"] |= {"micro_batch_sequences": 1, "batch_tokens": 256 * 32, **train}
    return RunConfig.check(tree, where="test")


@pytest.mark.parametrize(
    ("parallel", "each", "asked", "nodes"),
    [
        ({"expert": 2}, 2, None, Nodes(1, 2)),
        ({"expert": 2}, 2, 4, Nodes(4, 2)),
        ({"expert": 8}, 2, None, Nodes(4, 2)),
        ({"data": 4, "tensor": 2, "pipeline": 2}, 8, None, Nodes(2, 8)),
        ({"data": 4, "tensor": 2, "pipeline": 2}, 8, 2, Nodes(2, 8)),
        ({"data": 2}, 8, None, Nodes(1, 2)),  # less than a node
    ],
)
def test_nodes_from_the_layout(parallel: dict[str, Any], each: int, asked: int | None, nodes: Nodes) -> None:
    assert nodes_for(run(parallel), site(ranks_per_node=each), asked) == nodes


@pytest.mark.parametrize(
    ("parallel", "each", "asked", "found", "remedy"),
    [
        ({"data": 4}, 2, 3, "--nodes 3; the layout's 4 ranks (parallel.data=4) take 2", "--nodes 2"),
        ({"data": 2, "tensor": 2, "pipeline": 3}, 8, None, "12 ranks do not fill nodes of 8", "nearest that works"),
        ({"expert": 8}, 2, 3, "--nodes 3 x 2 ranks", "--nodes 4"),
        ({"tensor": 2}, 1, 3, "--nodes 3 x 1 ranks", "--nodes 2"),
        ({}, 2, 0, "--nodes 0", "leave it out"),
    ],
)
def test_nodes_that_contradict_are_refused_with_the_nearest(
    parallel: dict[str, Any], each: int, asked: int | None, found: str, remedy: str
) -> None:
    with pytest.raises(UserError) as met:
        nodes_for(run(parallel), site(ranks_per_node=each), asked)
    assert found in met.value.found and remedy in met.value.remedy


@given(st.integers(1, 9), st.integers(1, 8))
def test_what_is_planned_carries_the_layout(asked: int, each: int) -> None:
    from configs.layout import layout_faults

    config = run({"tensor": 2, "expert": 2})
    try:
        nodes = nodes_for(config, site(ranks_per_node=each), asked)
    except UserError:
        return
    assert nodes == Nodes(asked, each) and not layout_faults(config, nodes.ranks)
