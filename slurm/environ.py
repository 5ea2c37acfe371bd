"""What the launcher says of this process: its rank, how many there are, where they meet.

Understood: `deepspeed`, `torchrun` (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_*), `srun` with one task a rank (SLURM_*),
and plain `python` (one rank).
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from configs.errors import UserError

SUBMITTED = "GLAM_SUBMIT"  # set by the batch script, to its folder


@dataclass(frozen=True)
class LaunchEnv:
    """One process among `world_size`; `local_*` count those on the same machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    master_addr: str
    master_port: int
    launcher: str  # for messages: "deepspeed or torchrun", "srun", "python"

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> LaunchEnv:
        """Read the environment of this process, or the mapping given.

        Raises:
            UserError: variables are missing, not numbers, or contradict each other.
        """
        env = os.environ if environ is None else environ
        if "RANK" in env or "WORLD_SIZE" in env:
            return cls._from_torch(env)
        # Only a step's tasks have a step id; a batch script also sees SLURM_PROCID and is not one of several ranks.
        if "SLURM_PROCID" in env and env.get("SLURM_STEP_ID", "") not in ("", "4294967291", "4294967290"):
            return cls._from_srun(env)
        return cls(0, 1, 0, 1, "127.0.0.1", free_port(), "python")

    @classmethod
    def _from_torch(cls, env: Mapping[str, str]) -> LaunchEnv:
        local_size = "LOCAL_WORLD_SIZE" if env.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE"  # torchrun's, deepspeed's
        rank, world = _number(env, "RANK"), _number(env, "WORLD_SIZE")
        return cls(
            rank,
            world,
            _number(env, "LOCAL_RANK", default=0),
            _number(env, local_size, default=world),
            env.get("MASTER_ADDR", "127.0.0.1"),
            _number(env, "MASTER_PORT", default=29500),
            "deepspeed or torchrun",
        )._checked("RANK", "WORLD_SIZE", local_size)

    @classmethod
    def _from_srun(cls, env: Mapping[str, str]) -> LaunchEnv:
        size = "SLURM_STEP_NUM_TASKS" if env.get("SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
        world = _number(env, size)
        # "2(x3),1": three nodes with two tasks each, then one with one.
        tasks = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "")))
        return cls(
            _number(env, "SLURM_PROCID"),
            world,
            _number(env, "SLURM_LOCALID"),
            int(tasks.group()) if tasks else world,
            env.get("MASTER_ADDR") or env.get("SLURM_LAUNCH_NODE_IPADDR") or "127.0.0.1",
            _number(env, "MASTER_PORT", default=20000 + _number(env, "SLURM_JOB_ID", default=0) % 20000),
            "srun",
        )._checked("SLURM_PROCID", size, "tasks per node")

    def _checked(self, rank: str, size: str, local_size: str) -> LaunchEnv:
        if not 0 <= self.rank < self.world_size:
            raise _stale(f"{rank}={self.rank}, {size}={self.world_size}", f"0 <= {rank} < {size}")
        # srun tells the first node's number of tasks; another may have more, so there a rank beyond it is no error.
        if self.local_world_size < 1 or (self.launcher != "srun" and self.local_rank >= self.local_world_size):
            found = f"LOCAL_RANK={self.local_rank}, {local_size}={self.local_world_size}"
            raise _stale(found, f"0 <= LOCAL_RANK < {local_size}")
        if not 0 < self.master_port < 65536:
            raise _stale(f"MASTER_PORT={self.master_port}", "a port between 1 and 65535")
        return self


def _stale(found: str, expected: str) -> UserError:
    remedy = "start through deepspeed, torchrun, srun or plain python, and unset stale variables"
    return UserError(f"{found} in the environment", expected, remedy)


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    value = env.get(name)
    if not value and default is not None:
        return default
    if value is None or not re.fullmatch(r"[0-9]+", value.strip()):
        raise _stale(f"{name}={value!r}", f"{name} to be a number")
    return int(value)


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def outside_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment without what a job around this process, or the user's defaults, would tell sbatch: variables
    outrank the script's own options."""
    env = os.environ if environ is None else environ
    own = ("SLURM_CONF", "SLURM_CLUSTERS")
    return {k: v for k, v in env.items() if k in own or not k.startswith(("SLURM_", "SLURMD_", "SBATCH_", "SRUN_"))}


def submitted(environ: Mapping[str, str] | None = None) -> bool:
    """Whether a job of `glam submit` started this process: it comes back by itself, nobody typed a command."""
    return bool((os.environ if environ is None else environ).get(SUBMITTED))
