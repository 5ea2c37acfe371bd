"""What a fault costs a submitted run: steps that have to be made again, and seconds from the fault to the next step.

On a real SLURM of four nodes on this machine (tests/slurm_cluster; as root), two ranks on each of two. One run takes
the faults one after another, each while it trains, and goes on from each by itself.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import report
from benchmarks.faults_look import Look, Site
from benchmarks.launch import tiny_corpus
from configs.errors import UserError
from tests.slurm_cluster.cluster import NODES, Slurm, Unfit, started
from tests.slurm_cluster.tiny_run import GLAM, Submitted, TinyRun

SAVE_EVERY, SILENT_S, WATCHDOG_S, KILL_WAIT_S = 25, 10, 30, 5
SIZE_OF_DISK = "64m"
COLUMNS = {
    "case": "case",
    "candidate": "fault",
    "cause": "taken for",
    "lost": "steps lost",
    "noticed": "noticed",
    "ended": "ended",
    "queued": "queued, started",
    "imports": "imports, groups, engine",
    "checkpoint": "checkpoint",
    "first_step": "first step",
    "seconds": "in all, s",
}
# A rank whose main thread is told to sleep goes on to hear and to beat: that is what hanging is.
HANG = "import signal, time\nsignal.signal(signal.SIGUSR2, lambda *_: time.sleep(3600))\n"


# ---- faults: each strikes, and says when ----------------------------------------------------------------------------
def time_limit(site: Site) -> float:
    site.submitted.warn_once()
    return time.time()


def preemption(site: Site) -> float:
    now = time.time()
    options = ("--partition=high", f"--nodes={len(NODES)}", "--exclusive")
    site.slurm.sbatch("#!/bin/bash\nsleep 1\n", *options)
    return now


def requeue(site: Site) -> float:
    now = time.time()
    site.slurm.run("scontrol", "requeue", site.submitted.job)
    return now


def signal_of_operator(site: Site) -> float:
    now = time.time()
    site.slurm.cancel(site.submitted.job, signal="USR1")
    return now


def killed_rank(site: Site) -> float:
    return site.kill(site.rank(3))


def killed_first_rank(site: Site) -> float:
    return site.kill(site.rank(0))


def killed_srun(site: Site) -> float:
    return site.kill(site.slurm.processes("^srun .*job.sbatch task"))


def killed_launcher(site: Site) -> float:
    """Of the node that rank 0 runs on."""
    rank0 = site.rank(0)[0]
    return site.kill([int(site.slurm.run("ps", "-o", "ppid=", "-p", rank0))])


def killed_slurmstepd(site: Site) -> float:
    """And the ranks it looked after, so that nobody reports their end."""
    node = site.other_node
    site.slurm.kill_node(node, "slurmstepd")
    site.slurm.kill_node(node, "tasks")
    return time.time()


def dead_node(site: Site) -> float:
    now = time.time()
    site.slurm.kill_node(site.other_node)
    return now


def frozen_rank(site: Site) -> float:
    return site.kill(site.rank(3), "STOP")


def hung_rank(site: Site) -> float:
    return site.kill(site.rank(3), "USR2")


def full_disk(site: Site) -> float:
    with (site.run / "filler").open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 65536)
        except OSError:
            return time.time()


Strike = Callable[[Site], float]
ASKED: dict[str, Strike] = {
    "time limit (SLURM's warning)": time_limit,
    "preemption": preemption,
    "scontrol requeue": requeue,
    "scancel --signal=USR1": signal_of_operator,
}
BROKEN: dict[str, Strike] = {
    "rank killed": killed_rank,
    "rank 0 killed": killed_first_rank,
    "srun killed": killed_srun,
    "slurmstepd and its ranks killed": killed_slurmstepd,
    "node lost its power": dead_node,
    f"rank frozen (silent_s={SILENT_S})": frozen_rank,
    f"rank hangs (watchdog_s={WATCHDOG_S})": hung_rank,
}
UNDER_TORCHRUN: dict[str, Strike] = {"torchrun killed on one node": killed_launcher}
ENDING: dict[str, Strike] = {"disk full": full_disk}


# ---- runs -----------------------------------------------------------------------------------------------------------
def main(arguments: Sequence[str] | None = None) -> int:
    parser = report.make_parser("faults", (__doc__ or "").split("\n\n")[0], "python -m benchmarks.faults --rounds 2")
    parser.add_argument("--only", nargs="+", metavar="WORDS", help="faults whose names hold one of these")
    parsed = parser.parse_args(arguments)
    device = report.set_up(parsed)
    rounds = report.rounds_for(parsed, {"full": 1, "quick": 1, "smoke": 1})
    result = report.Report(
        "faults", report.size_of(parsed), report.machine_facts(device, parsed) | {"clock": "wall time"}
    )
    with report.output_kept_clean(), tempfile.TemporaryDirectory(prefix="faults") as scratch:
        folder = Path(scratch)
        try:
            with small_disk(folder / "disk"), started(folder / "cluster") as slurm:
                result.rows.extend(measure(slurm, folder, parsed.only or [""], rounds))
                result.notes.extend(notes())
        except Unfit as why:
            words = UserError(str(why), "a machine that can run a SLURM of its own", "see tests/slurm_cluster/up.sh")
            print(words, file=sys.stderr)
            return 2
    result.print(parsed.json, COLUMNS)
    return 0


def measure(slurm: Slurm, folder: Path, words: Sequence[str], rounds: int) -> Iterator[dict[str, report.Figure]]:
    def chosen(faults: dict[str, Strike]) -> dict[str, Strike]:
        return {name: strike for name, strike in faults.items() if any(word in name for word in words)}

    corpus = two_sources(folder)
    for number in range(rounds):
        if faults := chosen(ASKED) | chosen(BROKEN):
            site = begin(slurm, folder / f"srun{number}", corpus, partition="low")
            for name, strike in faults.items():
                yield one(site, "asked to stop" if name in ASKED else "broken", name, strike)
            finish(site)
        if faults := chosen(UNDER_TORCHRUN):
            site = begin(slurm, folder / f"torchrun{number}", corpus, launcher="torchrun")
            for name, strike in faults.items():
                yield one(site, "broken", name, strike)
            finish(site)
        for name, strike in chosen(ENDING).items():
            place = folder / "disk" if strike is full_disk else folder / f"ending{number}"
            site = begin(slurm, place, corpus)
            yield one_that_ends(site, "ends the job", name, strike)


def begin(slurm: Slurm, folder: Path, corpus: Path, **changes: Any) -> Site:
    slurm.clean_up()
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(HANG)
    settings: dict[str, Any] = {"kill_wait_s": KILL_WAIT_S, "max_restarts": 99, "max_without_progress": 99, **changes}
    settings["setup"] = [f"export PYTHONPATH={folder}:${{PYTHONPATH:-}}"]
    submitted = Submitted(slurm, TinyRun.write(folder, corpus), settings)
    limits = (
        f"cluster.silent_s={SILENT_S}",
        f"cluster.watchdog_s={WATCHDOG_S}",
        f"train.save_every_steps={SAVE_EVERY}",
    )
    submitted.submit(*limits)
    submitted.until_step(3)
    return Site(submitted)


def one(site: Site, case: str, name: str, strike: Strike) -> dict[str, report.Figure]:
    """A fault, half-way between two saves at the least, and what followed."""
    between_saves(site)
    look = Look(site)
    seen = look.until_decided(strike(site))
    look.until_training(seen)
    for node in NODES:
        site.slurm.mend_node(node)
    print(f"{seen.row(case, name)}", file=sys.stderr, flush=True)
    return seen.row(case, name)


def one_that_ends(site: Site, case: str, name: str, strike: Strike) -> dict[str, report.Figure]:
    """What the run needs a hand for: mended and submitted again, it goes on from its newest checkpoint."""
    between_saves(site)
    look = Look(site)
    seen = look.until_decided(strike(site))
    assert seen.decision
    if not seen.decision.requeue:
        site.slurm.wait(site.submitted.job)
    print(site.submitted.log()[look.said :], seen.decision, file=sys.stderr)
    site.slurm.run(*GLAM, "checkpoint", "verify", site.submitted.tiny.newest())
    if not seen.decision.requeue:
        (site.run / "filler").unlink(missing_ok=True)
        site.submitted.submit()
    look.until_training(seen)
    finish(site)
    row = seen.row(case, name)
    print(f"{row}", file=sys.stderr, flush=True)
    return {key: row.get(key) for key in ("case", "candidate", "cause", "lost", "noticed", "ended")}


def between_saves(site: Site) -> None:
    """A fault right after a save would cost nothing."""
    site.submitted.until_step(SAVE_EVERY)
    now = site.submitted.tiny.steps()[-1]
    site.submitted.until_step(now + (SAVE_EVERY * 3 // 5 - now) % SAVE_EVERY)


def finish(site: Site) -> None:
    site.slurm.run(*GLAM, "stop", site.run)
    site.slurm.wait(site.submitted.job)


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE_OF_DISK}", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def two_sources(folder: Path) -> Path:
    """A corpus as TinyRun wants it."""
    tokens = tiny_corpus(folder)
    for name in ("json", "email"):
        (tokens.parent / name).symlink_to(tokens)
    return tokens.parent.parent


def notes() -> list[str]:
    return [
        f"Four ranks on two cores, a model of 14,000 parameters, saves every {SAVE_EVERY} steps; faults come "
        f"{SAVE_EVERY * 3 // 5} steps or more after a save. Seconds from the fault until someone knows (a rank's own "
        "word, or the batch script's), until the end of the start was judged, until the next start's first "
        "process, and what that needs: imports, meeting, groups and engine; reading the checkpoint; the first step.",
        f"SLURM's share: it waits {KILL_WAIT_S} s (KillWait, 30 by default) before it kills what does not end at TERM; "
        "misses a node after SlurmdTimeout, 10 s here, 300 by default; starts a job again once its old credential has "
        "expired (AuthInfo cred_expire), 5 s here, 120 by default; looks at time limits every 30 s. kill_wait_s is "
        f"{KILL_WAIT_S} (60 by default), silent_s {SILENT_S} (60), watchdog_s {WATCHDOG_S} (1,200).",
        "A frozen rank's peers have ten seconds to end by themselves (GRACE_S) once its silence is noticed. A job that "
        "is warned, preempted or told to requeue makes another step and saves. Under a launcher that is killed ranks "
        "train on for a moment, so that a save under way may be lost beside the interval.",
    ]


if __name__ == "__main__":
    sys.exit(main())
