"""Talks to SLURM: sbatch, squeue, sinfo, scancel. The only file that starts other programs."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from configs.site import SiteConfig
from slurm.environ import outside_environment

_TIMEOUT_S = 60
_ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
)  # fmt: skip


@dataclass(frozen=True)
class Partition:
    """A line of sinfo."""

    name: str
    is_default: bool
    nodes: int
    is_up: bool
    time_limit_s: int | None  # None: without


@dataclass(frozen=True)
class Job:
    """A job that squeue knows."""

    id: str
    state: str  # PENDING, RUNNING, ...
    name: str
    reason: str  # why it waits; or the nodes it runs on


# ---- arguments of programs, and the reading of their answers: pure --------------------------------------------------
def sbatch_arguments(script: Path) -> list[str]:
    return ["sbatch", "--parsable", str(script)]


def read_job_id(answer: str) -> str:
    """Of `sbatch --parsable`: "12", or "12;cluster"."""
    lines = answer.strip().splitlines()
    number = lines[-1].split(";")[0] if lines else ""
    if not number.isdigit():
        raise UserError(f"sbatch answered {answer.strip()!r}", "the number of a job", "see squeue --me")
    return number


def sinfo_arguments() -> list[str]:
    return ["sinfo", "--noheader", "--format=%P|%F|%a|%l"]


def read_partitions(answer: str) -> list[Partition]:
    """Of lines such as "batch*|0/2/0/2|up|1-00:00:00": name, nodes (allocated/idle/other/total), state, time limit."""
    found: dict[str, Partition] = {}
    for line in answer.splitlines():
        name, counts, state, limit = (part.strip() for part in line.rsplit("|", 3))
        one = name.rstrip("*")
        nodes = int(counts.rsplit("/", 1)[-1]) + (found[one].nodes if one in found else 0)
        found[one] = Partition(one, name.endswith("*"), nodes, state == "up", _limit_seconds(limit))
    return list(found.values())


def _limit_seconds(text: str) -> int | None:
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text)
    if not match:
        return None  # infinite, n/a
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return days * 86400 + hours * 3600 + minutes * 60 + seconds


def check_partition(site: SiteConfig, nodes: int, partitions: Sequence[Partition]) -> None:
    """Refuse what SLURM would let wait for ever, or would refuse less clearly.

    Raises:
        UserError: no such partition, or it is down, smaller or of shorter jobs than asked.
    """
    names = [partition.name for partition in partitions]
    chosen = [p for p in partitions if (p.name == site.partition if site.partition else p.is_default)]
    if not chosen:
        if not site.partition:
            raise UserError("no partition is named, and SLURM has no default one", "one", f"one of {', '.join(names)}")
        near = difflib.get_close_matches(site.partition, names, n=1)
        hint = f"did you mean {near[0]!r}? There are: " if near else "there are: "
        raise UserError(f"partition {site.partition!r}", "one that SLURM knows", hint + ", ".join(names))
    partition = chosen[0]
    if not partition.is_up:
        raise UserError(f"partition {partition.name} is not up", "one that takes jobs", "sinfo says more")
    if nodes > partition.nodes:
        found = f"{nodes} nodes; partition {partition.name} has {partition.nodes}"
        fitting = [p.name for p in partitions if p.nodes >= nodes]
        remedy = f"--nodes {partition.nodes}" + (f", or partition {' or '.join(fitting)}" if fitting else "")
        raise UserError(found, "no more than there are", remedy)
    if partition.time_limit_s is not None and site.time_limit_s > partition.time_limit_s:
        found = f"time_limit {site.time_limit}; jobs of partition {partition.name} end after {partition.time_limit_s} s"
        remedy = "a shorter time_limit in the cluster's file; a run goes on by itself after each"
        raise UserError(found, "no more than the partition allows", remedy)


def squeue_arguments(jobs: Sequence[str]) -> list[str]:
    return ["squeue", "--noheader", f"--jobs={','.join(jobs)}", "--format=%i|%T|%j|%R"]


def read_jobs(answer: str) -> list[Job]:
    """Of squeue, which lists jobs that have ended too, for a while."""
    rows = [[part.strip() for part in line.split("|", 3)] for line in answer.splitlines() if line.count("|") >= 3]
    return [Job(*row) for row in rows if row[1] not in _ENDED]


def stop_arguments(job: Job) -> list[str]:
    """Of a job that runs, ask the ranks to save and stop; a job that waits has nothing to save."""
    return ["scancel", job.id] if job.state == "PENDING" else ["scancel", "--signal=USR1", job.id]


# ---- acting ---------------------------------------------------------------------------------------------------------
def require() -> None:
    """
    Raises:
        UserError: no SLURM on this machine.
    """
    if shutil.which("sbatch") is None:
        raise _no_program("sbatch")


def submit(script: Path) -> str:
    """Queue the script; returns the job's id.

    Raises:
        UserError: no SLURM here, or it refuses.
    """
    done = _run(sbatch_arguments(script))
    if done.returncode:
        told = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise UserError(f"sbatch refuses: {told}", "a job that SLURM takes", f"mend the cluster's file; see {script}")
    return read_job_id(done.stdout)


def partitions() -> list[Partition]:
    """All partitions of this cluster.

    Raises:
        UserError: no SLURM here, or it does not answer.
    """
    done = _run(sinfo_arguments())
    if done.returncode:
        told = " ".join(done.stderr.split())
        raise UserError(f"sinfo fails: {told}", "a SLURM controller that answers", "try again when sinfo works")
    return read_partitions(done.stdout)


def find_jobs(jobs: Sequence[str]) -> list[Job]:
    """Those of the jobs that wait or run, as far as SLURM still knows them.

    Raises:
        UserError: no SLURM here, or it does not answer; then nothing is known of the jobs.
    """
    if not jobs:
        return []
    done = _run(squeue_arguments(jobs))
    if done.returncode and "Invalid job id" not in done.stderr:
        told = " ".join(done.stderr.split())
        raise UserError(f"squeue fails: {told}", "a SLURM controller that answers", "try again when squeue works")
    return read_jobs(done.stdout)


def ask_to_stop(job: Job) -> None:
    """Ask a job to save and end, or take it from the queue.

    Raises:
        UserError: SLURM refuses.
    """
    done = _run(stop_arguments(job))
    if done.returncode:
        told = " ".join(done.stderr.split())
        raise UserError(f"scancel fails: {told}", "leave to signal the job", "as its owner, or when SLURM answers")


def _run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            arguments,
            env=outside_environment(os.environ),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise _no_program(arguments[0]) from None
    except subprocess.TimeoutExpired:
        found = f"{arguments[0]} does not answer within {_TIMEOUT_S} s"
        raise UserError(found, "a SLURM controller that answers", "try again later") from None


def _no_program(name: str) -> UserError:
    remedy = "log in to a node of the cluster; without SLURM: torchrun or deepspeed pretrain/main.py --config ..."
    return UserError(f"no {name} on this machine", "SLURM's commands on PATH", remedy)
