"""What each launcher's environment is read as. The mappings are what the launchers really set."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from slurm.environ import LaunchEnv

DEEPSPEED = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "10.0.0.7",
    "MASTER_PORT": "29501",
}
TORCHRUN = {
    "RANK": "5",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "8",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node-1",
    "MASTER_PORT": "40000",
    "TORCHELASTIC_RUN_ID": "none",
}
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_TASKS_PER_NODE": "2(x3),1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x3),1",
    "SLURM_LAUNCH_NODE_IPADDR": "10.1.0.1",
}


def without(env: dict[str, str], *names: str) -> dict[str, str]:
    return {key: value for key, value in env.items() if key not in names}


def test_deepspeed() -> None:
    assert LaunchEnv.read(DEEPSPEED) == LaunchEnv(3, 4, 1, 2, "10.0.0.7", 29501, "deepspeed or torchrun")


def test_torchrun() -> None:
    assert LaunchEnv.read(TORCHRUN) == LaunchEnv(5, 8, 1, 4, "node-1", 40000, "deepspeed or torchrun")


def test_bare_variables_are_enough() -> None:
    env = LaunchEnv.read({"RANK": "0", "WORLD_SIZE": "1"})
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (0, 1, 0, 1)
    assert env.master_addr == "127.0.0.1"


def test_srun_with_a_task_for_each_rank() -> None:
    env = LaunchEnv.read(SRUN)
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (5, 7, 1, 2)
    assert (env.master_addr, env.launcher) == ("10.1.0.1", "srun")


def test_all_tasks_of_a_job_meet_at_one_port_and_jobs_at_different_ones() -> None:
    ports = {LaunchEnv.read({**SRUN, "SLURM_PROCID": str(rank)}).master_port for rank in range(7)}
    other = LaunchEnv.read({**SRUN, "SLURM_JOB_ID": "1235"}).master_port
    assert len(ports) == 1 and other not in ports
    assert all(1024 < port < 65536 for port in (*ports, other))


@given(st.integers(0, 2**32))
def test_port_of_any_job_is_a_port(job: int) -> None:
    assert 1024 < LaunchEnv.read({**SRUN, "SLURM_JOB_ID": str(job)}).master_port < 65536


def test_what_the_user_sets_wins_under_srun() -> None:
    env = LaunchEnv.read({**SRUN, "MASTER_ADDR": "node-9", "MASTER_PORT": "31000"})
    assert (env.master_addr, env.master_port) == ("node-9", 31000)


def test_a_step_may_have_fewer_tasks_than_the_job() -> None:
    env = LaunchEnv.read({**SRUN, "SLURM_STEP_NUM_TASKS": "6", "SLURM_STEP_TASKS_PER_NODE": "3(x2)"})
    assert (env.world_size, env.local_world_size) == (6, 3)


@pytest.mark.parametrize("step", [None, "", "4294967291", "4294967290"])
def test_batch_script_is_one_rank(step: str | None) -> None:
    """A batch script sees SLURM_PROCID=0 and the job's task count, but is no task of a step (or of a reserved one)."""
    env = without(SRUN, "SLURM_STEP_ID") | {"SLURM_PROCID": "0"} | ({} if step is None else {"SLURM_STEP_ID": step})
    read = LaunchEnv.read(env)
    assert (read.rank, read.world_size, read.launcher) == (0, 1, "python")


def test_deepspeed_inside_a_slurm_step_is_deepspeed() -> None:
    assert LaunchEnv.read({**SRUN, **DEEPSPEED}) == LaunchEnv.read(DEEPSPEED)


def test_plain_python_is_one_rank_on_a_free_port() -> None:
    env = LaunchEnv.read({})
    assert (env.rank, env.world_size, env.local_rank, env.local_world_size) == (0, 1, 0, 1)
    with socket.socket() as probe:
        probe.bind((env.master_addr, env.master_port))


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*SRUN, *TORCHRUN, *DEEPSPEED):
        monkeypatch.delenv(name, raising=False)
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert LaunchEnv.read() == LaunchEnv.read(TORCHRUN)


@pytest.mark.parametrize(
    ("env", "told"),
    [
        (without(TORCHRUN, "WORLD_SIZE"), ("WORLD_SIZE=None",)),
        (without(TORCHRUN, "RANK"), ("RANK=None",)),
        ({**TORCHRUN, "RANK": "one"}, ("RANK='one'",)),
        ({**TORCHRUN, "RANK": ""}, ("RANK=''",)),
        ({**TORCHRUN, "RANK": "-1"}, ("RANK='-1'",)),
        ({**TORCHRUN, "RANK": "²"}, ("RANK='²'",)),  # a digit to str.isdigit, not to int
        ({**TORCHRUN, "RANK": "8"}, ("RANK=8", "WORLD_SIZE=8")),
        ({**TORCHRUN, "WORLD_SIZE": "0", "RANK": "0"}, ("WORLD_SIZE=0",)),
        ({**TORCHRUN, "LOCAL_RANK": "x"}, ("LOCAL_RANK='x'",)),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "x"}, ("LOCAL_WORLD_SIZE='x'",)),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "0"}, ("LOCAL_WORLD_SIZE=0",)),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, ("LOCAL_RANK=4", "LOCAL_WORLD_SIZE=4")),
        ({**TORCHRUN, "MASTER_PORT": "http"}, ("MASTER_PORT='http'",)),
        ({**TORCHRUN, "MASTER_PORT": "99999"}, ("MASTER_PORT=99999",)),
        (without(SRUN, "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"), ("SLURM_NTASKS=None",)),
        (without(SRUN, "SLURM_LOCALID"), ("SLURM_LOCALID=None",)),
        ({**SRUN, "SLURM_PROCID": "x"}, ("SLURM_PROCID='x'",)),
        ({**SRUN, "SLURM_PROCID": "7"}, ("SLURM_PROCID=7", "7")),
        ({**SRUN, "SLURM_STEP_NUM_TASKS": "many"}, ("SLURM_STEP_NUM_TASKS='many'",)),
        ({**SRUN, "MASTER_PORT": "http"}, ("MASTER_PORT='http'",)),
        ({**SRUN, "SLURM_JOB_ID": "x"}, ("SLURM_JOB_ID='x'",)),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, tuple) else "",
)
def test_broken_environment_is_refused(env: dict[str, str], told: tuple[str, ...]) -> None:
    """Stale or half-set variables: which one, its value, and a remedy; never a ValueError."""
    with pytest.raises(UserError) as met:
        LaunchEnv.read(env)
    assert all(part in met.value.found for part in told), met.value.found
    assert met.value.remedy
