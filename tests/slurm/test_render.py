"""The script of a job: what stands in it, and that no value in a configuration becomes a word of shell."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from configs.site import SiteConfig
from slurm.render import JobPlan, render_prep, render_training
from tests.slurm.plans import HEAD_ENDS, ROOT, make_plan, stub

PRINT_WORDS = "printf '%s\\0' \"$@\""
# Whatever a line of YAML can hold; the shell's own characters often.
LINES = st.text(
    st.one_of(
        st.sampled_from("'\"\\$`;&|<>()#%*?!~{}[] \t=-"),
        st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029\x85"),
    ),
    max_size=30,
)
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def bash(script: str, *arguments: str, path: Path | None = None) -> list[str]:
    """What it prints, cut at NUL bytes; it must end well and say nothing else."""
    environ = {"PATH": f"{path}:{os.environ['PATH']}" if path else os.environ["PATH"], "HOME": "/nonexistent"}
    done = subprocess.run(
        ["bash", "-c", script, "job", *arguments], capture_output=True, env=environ, timeout=20, check=False
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout.decode().split("\0")[:-1]


def head(script: str) -> str:
    """What varies of a script, without the life of the job."""
    return script[: script.index(HEAD_ENDS)]


def directives(script: str) -> dict[str, str]:
    lines = [line.removeprefix("#SBATCH --") for line in script.splitlines() if line.startswith("#SBATCH")]
    return dict(line.partition("=")[::2] for line in lines)


def test_options_of_the_job(tmp_path: Path) -> None:
    plan = make_plan(
        tmp_path, nodes=3, partition="gpu", account="a", qos="q", gpus_per_node=2, gpu_type="h100", memory="0",
        cpus_per_rank=4, time_limit="1-00:00:00", warning_s=300, sbatch_options=["--exclusive"],
    )  # fmt: skip
    assert directives(render_training(plan)) == {
        "job-name": "tiny", "partition": "gpu", "account": "a", "qos": "q", "nodes": "3", "ntasks-per-node": "2",
        "cpus-per-task": "4", "gres": "gpu:h100:2", "mem": "0", "time": "1-00:00:00", "signal": "B:USR1@300",
        "chdir": str(tmp_path), "output": f"{tmp_path}/run/submits/0001/job.log", "open-mode": "append",
        "requeue": "", "exclusive": "",
    }  # fmt: skip


def test_options_that_are_null_are_left_out(tmp_path: Path) -> None:
    found = directives(render_training(make_plan(tmp_path)))
    assert not found.keys() & {"partition", "account", "qos", "gres", "mem"}


@pytest.mark.parametrize("launcher", ["srun", "deepspeed", "torchrun", "prep"])
@pytest.mark.parametrize("example", sorted((ROOT / "slurm" / "clusters").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_script_is_bash(tmp_path: Path, launcher: str, example: Path) -> None:
    plan = replace(make_plan(tmp_path, launcher=launcher), site=SiteConfig.load(example))
    script = render_prep(plan) if launcher == "prep" else render_training(plan)
    done = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert max(len(line) for line in script.splitlines()) <= 200


def test_one_task_a_rank(tmp_path: Path) -> None:
    stub(tmp_path / "bin", "srun", PRINT_WORDS)
    script = render_training(make_plan(tmp_path, cpus_per_rank=3, srun_options=["--label"]))
    words = bash(head(script) + "launch", path=tmp_path / "bin")
    assert words == [
        "--kill-on-bad-exit=1", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--cpus-per-task=3", "--label",
        "bash", f"{tmp_path}/run/submits/0001/job.sbatch", "task",
    ]  # fmt: skip
    plan = make_plan(tmp_path, python="python3.11")
    stub(tmp_path / "bin", "python3.11", PRINT_WORDS)
    assert bash(render_training(plan), "task", path=tmp_path / "bin") == [
        f"{plan.submit_dir}/code/pretrain/main.py", "--config", f"{plan.submit_dir}/config.yaml",
    ]  # fmt: skip


def test_one_task_a_node_under_the_launchers(tmp_path: Path) -> None:
    """Stubs stand in for srun and scontrol here; a real SLURM runs these in tests/slurm_cluster."""
    stub(tmp_path / "bin", "srun", PRINT_WORDS + '; printf \'%s\\0\' "$MASTER_ADDR" "$MASTER_PORT"')
    stub(tmp_path / "bin", "scontrol", "echo one; echo two")
    stub(tmp_path / "bin", "py", PRINT_WORDS)
    known = "SLURM_JOB_NODELIST=x SLURM_JOB_ID=20007 SLURM_NODEID=1 MASTER_ADDR=one MASTER_PORT=20007\n"
    for launcher, words in {
        "deepspeed": ["-m", "deepspeed.launcher.runner", "--no_ssh", "--node_rank=1"],
        "torchrun": ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--max_restarts=0"],
    }.items():
        plan = make_plan(tmp_path, launcher=launcher, python="py", cpus_per_rank=3)
        plan.submit_dir.mkdir(parents=True, exist_ok=True)
        script = render_training(plan)
        started = bash(known + head(script) + "launch", path=tmp_path / "bin")
        assert {"--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=6"} <= set(started)
        assert started[-2:] == ["one", "20007"]
        task = bash(known + script, "task", path=tmp_path / "bin")
        assert task[: len(words)] == words and {"--node_rank=1", "--master_addr=one"} <= set(task)
        assert task[-2:] == ["--config", str(plan.config)]
    assert (tmp_path / "run/submits/0001/hostfile").read_text() == "one slots=2\ntwo slots=2\n"


def test_prep_starts_mpi_ranks(tmp_path: Path) -> None:
    stub(tmp_path / "bin", "srun", PRINT_WORDS)
    stub(tmp_path / "bin", "py", PRINT_WORDS)
    plan = make_plan(tmp_path, mpi="pmix", python="py")
    assert "--mpi=pmix" in bash(head(render_prep(plan)) + "launch", path=tmp_path / "bin")
    words = bash(render_prep(plan), "task", path=tmp_path / "bin")
    assert words == [f"{plan.code}/pretrain/cli.py", "prep", str(plan.config)]


@FEW
@given(image=LINES, mount=LINES, value=LINES, python=LINES)
def test_no_value_becomes_shell(tmp_path: Path, image: str, mount: str, value: str, python: str) -> None:
    """Each is one word, the same one, wherever it is used: in the environment, and as arguments of a rank."""
    stub(tmp_path / "bin", "box", PRINT_WORDS)
    container = {"prefix": ["box", "run"], "image": image, "mounts": [mount]}
    plan = make_plan(tmp_path, container=container, env={"VALUE": value}, python=python)
    script = render_training(plan)
    words = bash(script, "task", path=tmp_path / "bin")
    name = plan.python  # an empty one is none
    assert words[:5] == ["run", "--bind", mount, image, name] and words[5].endswith("main.py")
    before = sorted(tmp_path.iterdir())
    assert bash(head(script) + 'printf \'%s\\0\' "$VALUE" "${PYTHON[@]}"') == [value, "box", *words[:5]]
    assert sorted(tmp_path.iterdir()) == before


@FEW
@given(folder=LINES, name=LINES)
def test_no_value_becomes_an_option_of_sbatch(folder: str, name: str) -> None:
    """sbatch reads quotes and signs in a way of its own: what is no plain word is refused."""
    root = Path("/r") / folder.replace("/", "_")
    plan = replace(make_plan(root), name=name)
    try:
        script = render_training(plan)
    except UserError as refused:
        assert "for sbatch's" in refused.found and refused.remedy
        return
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH")]
    assert len(lines) == 10 and all(re.fullmatch(r"#SBATCH --[a-z-]+(=[^\s'\"\\#%$`;<>]+)?", line) for line in lines)


def test_folders_with_a_space_are_refused_with_a_remedy(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="without the others"):
        render_training(make_plan(tmp_path / "my runs"))


def test_of_the_typing_shell_no_rank_hears(tmp_path: Path) -> None:
    script = head(render_training(make_plan(tmp_path, env={"MASTER_PORT": "29999"})))
    said = bash("export RANK=3 WORLD_SIZE=9 MASTER_PORT=1\n" + script + 'printf "%s\\0" "${RANK-no}" "$MASTER_PORT"')
    assert said == ["no", "29999"]


def test_the_snapshot_comes_before_other_modules(tmp_path: Path) -> None:
    script = head(render_training(make_plan(tmp_path)))
    assert bash("PYTHONPATH=/mine\n" + script + 'printf "%s\\0" "$PYTHONPATH"') == [
        f"{tmp_path}/run/submits/0001/code:/mine"
    ]


def test_time_to_give_up_lies_before_the_limit(tmp_path: Path) -> None:
    def seconds(plan: JobPlan) -> int:
        return int(bash(head(render_training(plan)) + 'printf "%s\\0" "$GIVE_UP_S"')[0])

    assert seconds(make_plan(tmp_path, warning_s=60)) == 15 and seconds(make_plan(tmp_path, warning_s=300)) == 255
