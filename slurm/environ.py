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
        return cls(0, 1, 0, 1, "127.0.0.1", _free_port(), "python")

    @classmethod
    def _from_torch(cls, env: Mapping[str, str]) -> LaunchEnv:
        launcher = "deepspeed or torchrun"
        rank, world = _number(env, "RANK", launcher), _number(env, "WORLD_SIZE", launcher)
        local_rank = _number(env, "LOCAL_RANK", launcher) if "LOCAL_RANK" in env else 0
        local_world = int(env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or world)
        if not 0 <= rank < world:
            raise UserError(f"RANK={rank}, WORLD_SIZE={world}", "0 <= RANK < WORLD_SIZE", "unset stale variables")
        port = _number(env, "MASTER_PORT", launcher) if "MASTER_PORT" in env else 29500
        return cls(rank, world, local_rank, local_world, env.get("MASTER_ADDR", "127.0.0.1"), port, launcher)

    @classmethod
    def _from_srun(cls, env: Mapping[str, str]) -> LaunchEnv:
        rank = _number(env, "SLURM_PROCID", "srun")
        world = int(env.get("SLURM_STEP_NUM_TASKS") or _number(env, "SLURM_NTASKS", "srun"))
        local_rank = _number(env, "SLURM_LOCALID", "srun")
        # "2(x3),1": three nodes with two tasks each, then one with one.
        tasks = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "")))
        local_world = int(tasks.group()) if tasks else world
        addr = env.get("MASTER_ADDR") or env.get("SLURM_LAUNCH_NODE_IPADDR") or "127.0.0.1"
        port = int(env.get("MASTER_PORT") or 20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000)
        return cls(rank, world, local_rank, local_world, addr, port, "srun")


def _number(env: Mapping[str, str], name: str, launcher: str) -> int:
    value = env.get(name)
    if value is None or not value.strip().isdigit():
        raise UserError(
            f"{name}={value!r} in the environment of a process started by {launcher}",
            f"{name} to be a number",
            "start through deepspeed, torchrun, srun or plain python, and unset stale variables",
        )
    return int(value)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
