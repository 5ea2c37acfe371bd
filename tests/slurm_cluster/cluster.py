"""A real SLURM for tests, of four nodes with two CPUs each, and the plugs one may pull."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CANNOT_RUN_HERE = 77
NODES = ("node1", "node2", "node3", "node4")
TWO_BY_TWO = ("--nodes=2", "--ntasks=4", "--ntasks-per-node=2")
PATIENCE_S = 240.0  # on a machine with much else to do; what goes wrong usually ends a job, and with it the wait
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "OUT_OF_MEMORY")
_FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM", "CROSS_", "PMI_")


class Unfit(Exception):
    """This machine cannot run a SLURM of its own; the message says why."""


@contextmanager
def started(folder: Path) -> Iterator[Slurm]:
    """A cluster with its state in `folder`; it ends with the block, and with this process whichever way that ends."""
    read_end, write_end = os.pipe()  # the cluster lives as long as nobody closes the other end
    try:
        done = _script("up.sh", folder, stdin=read_end)
        if done.returncode:
            told = (done.stdout.strip().splitlines() or ["up.sh says nothing"])[-1]
            raise Unfit(
                told if done.returncode == CANNOT_RUN_HERE else f"SLURM does not run here: {told}; {done.stderr}"
            )
        yield Slurm(folder)
    finally:
        os.close(read_end)
        _script("down.sh", folder)
        os.close(write_end)


def _script(name: str, *arguments: object, stdin: int = subprocess.DEVNULL) -> subprocess.CompletedProcess[str]:
    command = [str(HERE / name), *map(str, arguments)]
    return subprocess.run(command, stdin=stdin, capture_output=True, text=True, timeout=600, check=False)


class Slurm:
    """Commands on the cluster. Jobs and steps start in the repository's root."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        clean = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
        # Compiled once for all ranks and starts of a run, and beside no source.
        self.environ = clean | {"OMP_NUM_THREADS": "1", "PYTHONPYCACHEPREFIX": str(folder / "pycache")}
        self.environ.pop("PYTHONDONTWRITEBYTECODE", None)

    @property
    def has_networks(self) -> bool:
        return (self.folder / "mode").read_text().strip() == "ns"

    def address(self, node: str) -> str:
        lines = (line.split() for line in (self.folder / "etc/nodes").read_text().splitlines())
        return {name: address for address, name in lines}[node]

    def run(self, *command: object, code: int | None = 0, timeout_s: float = PATIENCE_S) -> str:
        """What a command said that was typed where the cluster can be reached; it must end with `code`, if not None."""
        process = subprocess.Popen(
            [str(self.folder / "exec"), *map(str, command)], cwd=ROOT, env=self.environ, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            said, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.terminate()
            said, _ = process.communicate(timeout=20)
            raise AssertionError(f"{command} took more than {timeout_s} s:\n{said}") from None
        assert code is None or process.returncode == code, f"exit code {process.returncode}\n{said}"
        return said

    def srun(self, *arguments: object, code: int | None = 0, timeout_s: float = PATIENCE_S) -> str:
        """Two tasks on each of two nodes, from outside any job, as from a login node."""
        return self.run("srun", *TWO_BY_TWO, *arguments, code=code, timeout_s=timeout_s)

    def job(self, *arguments: object, options: Sequence[str] = ()) -> int:
        """The same from within a job of its own, which ends with srun's exit code."""
        command = shlex.join(map(str, arguments))
        return self.sbatch(f"#!/bin/bash\nexec srun {' '.join(TWO_BY_TWO)} {command}\n", *TWO_BY_TWO, *options)

    def sbatch(self, script: Path | str, *options: str) -> int:
        """Submit a file, or a script's text; returns the job's number."""
        if isinstance(script, str):
            path = self.folder / f"job-{time.monotonic_ns()}.sh"
            path.write_text(script)
            script = path
        output = f"--output={self.folder}/job-%j.log"
        return int(self.run("sbatch", "--parsable", output, *options, script).split(";")[0])

    def facts(self, job: int) -> dict[str, str]:
        """What `scontrol show job` says."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", job, "-o")))

    def state(self, job: int) -> str:
        return self.facts(job)["JobState"]

    def restarts(self, job: int) -> int:
        """How often it was requeued."""
        return int(self.facts(job)["Restarts"])

    def log(self, job: int) -> str:
        path = Path(self.facts(job)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, job: int, states: str | Sequence[str] = ENDED, timeout_s: float = PATIENCE_S) -> str:
        """Until the job is in one of the states; ended jobs do not leave theirs."""
        wanted = (states,) if isinstance(states, str) else states
        self.until(job, lambda: self.state(job) in wanted, f"to be {' or '.join(wanted)}", timeout_s)
        return self.state(job)

    def until(self, job: int, true: Callable[[], bool], what: str, timeout_s: float = PATIENCE_S) -> None:
        """Until something is true while the job has not ended in another way."""
        deadline = time.monotonic() + timeout_s
        while not true():
            state = self.state(job)
            late = time.monotonic() > deadline
            if late or (state in ENDED and not true()):
                why = f"{timeout_s:.0f} s passed" if late else "it ended"
                raise AssertionError(f"job {job} was {what}; {why}, it is {state}\n{self.log(job)}")
            time.sleep(0.2)

    def cancel(self, *jobs: int, signal: str | None = None) -> None:
        self.run("scancel", *([f"--signal={signal}"] if signal else []), *jobs)

    def warn_soon(self, job: int) -> None:
        """Move the job's time limit to where SLURM's warning a minute before is due, and time is left to hear it.

        SLURM looks every 30 s, warns of what will be due by the next look, and takes limits in whole minutes.
        """
        hours, minutes, seconds = (int(part) for part in self.facts(job)["RunTime"].split(":"))
        limit = -(-(hours * 3600 + minutes * 60 + seconds + 50) // 60)
        self.run("scontrol", "update", f"JobId={job}", f"TimeLimit={limit}")

    def kill_node(self, node: str, what: str = "node") -> str:
        """No power any more (`node`); or SIGKILL to its `slurmd`, `slurmstepd` or `tasks`. Says what was killed."""
        done = _script("kill.sh", self.folder, node, what)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def cut_node(self, node: str) -> None:
        """Node and controller no longer hear each other; all else goes on."""
        done = _script("cut.sh", self.folder, node)
        assert done.returncode == 0, done.stdout + done.stderr

    def mend_node(self, node: str) -> None:
        done = _script("mend.sh", self.folder, node)
        assert done.returncode == 0, done.stdout + done.stderr

    def node_states(self) -> dict[str, str]:
        lines = self.run("sinfo", "-h", "-N", "-p", "batch", "-o", "%N %T").split("\n")
        return dict(line.split() for line in lines if line)

    def processes(self, words: str) -> list[int]:
        """Process ids, as the cluster numbers them, whose command line holds the words."""
        return [int(line) for line in self.run("pgrep", "-f", words, code=None).split()]

    def clean_up(self) -> None:
        """No jobs, nothing left of any, and all nodes idle."""
        if jobs := self.run("squeue", "-h", "-o", "%A").split():
            self.cancel(*map(int, jobs))
        for node in NODES:
            self.mend_node(node)
        deadline = time.monotonic() + PATIENCE_S
        while (states := self.node_states()) != dict.fromkeys(NODES, "idle"):
            assert time.monotonic() < deadline, f"{states}\n{self.run('squeue')}"
            time.sleep(0.2)
        for node in NODES:
            self.kill_node(node, "tasks")
