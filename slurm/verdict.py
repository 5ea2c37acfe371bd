"""Whether a job whose step has ended is queued again: `python -m slurm.verdict RUN --code N --job J ...`.

The batch script asks this and obeys. Exit codes of srun lie (0 after a node failure, 143 for a crash's 3), so what
the ranks wrote of themselves outweighs them. Each decision becomes a line of RUN/restarts.jsonl.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_STOPPED
from slurm import run_folder
from slurm.run_folder import FAILED, RUNNING, STOPPED, Decision, RankStatus

REQUEUE, END_WELL, END_BADLY = 0, 10, 11  # exit codes; any other means that no verdict could be had
# Causes that a further start would meet again, and what helps.
REMEDIES: Mapping[str, str] = {
    "configuration": "mend the configuration; `glam submit` starts it again",
    "disk": "free space on the run folder's disk, or mend it; `glam submit` goes on from the newest checkpoint",
    "nan": "look at the batches that RUN/metrics.jsonl names, lower the learning rate or leave data out; then submit",
    "out_of_memory": "smaller micro-batches, train.recompute=true or more ranks a model; then submit again",
}


@dataclass(frozen=True)
class JobState:
    """What SLURM says of the job while its batch script still runs."""

    leaving: bool = False  # SLURM is ending the job of its own accord: scancel, a preemption's last word, a lost node
    timed_out: bool = False
    preempted: bool = False  # within the grace time
    restarts: int | None = None

    @classmethod
    def read(cls, text: str) -> JobState:
        """Of a line of `scontrol show job --oneliner`; empty or foreign text means nothing special."""
        fields = dict(re.findall(r"(?:^|\s)(JobState|RunTime|TimeLimit|PreemptTime|Restarts)=(\S+)", text))
        ending = fields.get("JobState", "RUNNING") not in ("RUNNING", "SUSPENDED")
        ran, limit = _seconds(fields.get("RunTime", "")), _seconds(fields.get("TimeLimit", ""))
        timed_out = ending and ran is not None and limit is not None and ran >= limit
        preempted, restarts = fields.get("PreemptTime", "")[:1].isdigit(), fields.get("Restarts", "")
        return cls(ending and not timed_out, timed_out, preempted, int(restarts) if restarts.isdigit() else None)


@dataclass(frozen=True)
class Ending:
    """All that is known of a start that has ended."""

    done: bool
    stop: bool
    code: int  # of srun
    signal: str | None  # that reached the batch script: USR1 (the limit is near) or TERM
    slurm: JobState
    ranks: tuple[RankStatus, ...]  # of this start
    step: int | None  # of the newest checkpoint
    before: tuple[Decision, ...]  # of this job, oldest first
    starts: int = 1  # of the run since this job's
    restarts: int | None = None  # of this job, as its script knows


@dataclass(frozen=True)
class Limits:
    max_restarts: int  # after faults
    max_without_progress: int  # faults, or time limits, in a row at the same checkpoint


@dataclass(frozen=True)
class Verdict:
    requeue: bool
    reason: str
    cause: str
    counted: bool = False  # a fault

    @property
    def exit_code(self) -> int:
        if self.requeue:
            return REQUEUE
        return END_WELL if self.cause in ("done", "stop") else END_BADLY


def decide(ending: Ending, limits: Limits) -> Verdict:
    """The one rule of whether a run goes on by itself."""
    if ending.done or (ending.ranks and all(rank.state == "done" for rank in ending.ranks)):
        return Verdict(False, "the run is done", "done")
    if ending.stop:
        return Verdict(False, "RUN/STOP is there: the run was asked to stop; `glam submit` goes on with it", "stop")
    if owner := _other_owner(ending):
        return Verdict(False, f"{owner}: this older job leaves the run to it", "taken_over")
    cause, told = find_cause(ending)
    if cause in REMEDIES:
        return Verdict(False, f"{cause}: {told}. Not queued again: {REMEDIES[cause]}", cause, counted=True)
    if ending.slurm.leaving and ending.signal != "USR1":
        reason = "SLURM itself ends this job: it queues it again after a preemption or a lost node, not after scancel"
        return Verdict(False, reason, "interrupted")
    if cause in ("stopped", "time_limit", "preempted"):
        return _after_a_stop(ending, limits, cause, told)
    faults = sum(decision.counted for decision in ending.before)
    if faults >= limits.max_restarts:
        used = f"{faults} restart(s) after faults are used up (max_restarts)"
        return Verdict(False, f"{cause}: {told}; {used}. `glam submit` grants new ones", cause, counted=True)
    if (row := _in_a_row(ending)) >= limits.max_without_progress:
        where = f"{row} in a row at {_place(ending.step)} (max_without_progress): a further start would meet it again"
        return Verdict(False, f"{cause}: {told}; {where}", cause, counted=True)
    left = f"restart {faults + 1} of {limits.max_restarts}"
    return Verdict(True, f"{cause}: {told}; {left}, from {_place(ending.step)}", cause, counted=True)


def _other_owner(ending: Ending) -> str | None:
    """Of a network that was cut, both sides may run a start of the same job; only the newer may go on."""
    queued_anew = None not in (ending.slurm.restarts, ending.restarts) and ending.slurm.restarts != ending.restarts
    if queued_anew:
        return "SLURM has started this job again meanwhile"
    if ending.starts > 1:
        return "another start of this run has taken over"
    words = {rank.cause: rank for rank in ending.ranks if rank.state == FAILED and rank.cause}
    if set(words) == {"interrupted"} and not _asked(ending):
        return f"interrupted: {_word_of(words['interrupted'])}"
    return None


def find_cause(ending: Ending) -> tuple[str, str]:
    """What ended the start (stopped, time_limit, preempted, or a fault), and what shows it."""
    failed = sorted((r for r in ending.ranks if r.state == FAILED), key=lambda rank: rank.time)
    # What one rank dies of, the others see as a lost peer or a hang: a cause that tells more speaks for all.
    for rank in failed:
        if rank.cause is not None and rank.cause in REMEDIES:
            return rank.cause, _word_of(rank)
    stopped = [rank for rank in ending.ranks if rank.state == STOPPED]
    killed = [rank for rank in ending.ranks if rank.state == RUNNING]
    if asked := _asked(ending):
        left = f", {len(failed)} rank(s) failed and {len(killed)} did not end" if failed or killed else ""
        return asked, f"asked to stop{left}"
    if stopped and not failed:
        return "stopped", "the ranks were asked to stop, and saved"
    hangs = any(rank.cause == "hang" for rank in failed)  # those that were in each other's way are killed with the step
    if killed and not hangs and ending.code != EXIT_STOPPED:
        words = [rank for rank in failed if rank.cause] or failed
        # Of several, the one that has been silent longest; the others may have been killed with the step.
        others, first = f"; {_word_of(words[0])}" if words else "", min(killed, key=lambda rank: rank.beat)
        return "killed", f"{len(killed)} rank(s) ended without a word, rank {first.rank} on {first.host} first{others}"
    if failed:
        first = next((rank for rank in failed if rank.cause), failed[0])  # the others ended for another's sake
        return first.cause or "unknown", _word_of(first)
    if ending.code == EXIT_STOPPED:
        return "stopped", "state saved (exit code 3)"
    if ending.code == EXIT_BAD_INPUT:
        return "configuration", "bad input (exit code 2; the message stands above)"
    if ending.code == EXIT_DONE:
        return "unknown", "srun says 0, but nothing says that the run is done"
    return "unknown", f"exit code {ending.code}, and no rank left a word"


def _asked(ending: Ending) -> str | None:
    """Who asked the start to stop, as far as the batch script heard of it."""
    if ending.signal == "USR1" or ending.slurm.timed_out:
        return "time_limit"
    return "preempted" if ending.slurm.preempted or ending.signal == "TERM" else None


def _after_a_stop(ending: Ending, limits: Limits, cause: str, told: str) -> Verdict:
    """Stops are free, but a time limit too short for one step would go round for ever."""
    if cause == "time_limit" and (row := _in_a_row(ending)) >= limits.max_without_progress:
        reason = f"the time limit came {row} times in a row at {_place(ending.step)}: raise time_limit, or save oftener"
        return Verdict(False, reason, cause)
    return Verdict(True, f"{cause}: {told}; goes on from {_place(ending.step)}", cause)


def _in_a_row(ending: Ending) -> int:
    """Starts in a row, this one included, that ended at the newest checkpoint there is now; preemptions say nothing."""
    row = 1
    for decision in reversed(ending.before):
        if decision.step != ending.step:
            break
        row += decision.counted or decision.cause == "time_limit"
    return row


def _word_of(rank: RankStatus) -> str:
    where = f"rank {rank.rank} on {rank.host}" if rank.host else f"rank {rank.rank}"
    at = f" at step {rank.step}" if rank.step is not None else ""
    return " ".join(f"{where}{at}: {rank.detail or rank.cause or 'failed'}".split())


def _place(step: int | None) -> str:
    return "the beginning (no checkpoint yet)" if step is None else f"the checkpoint of step {step}"


def _seconds(text: str) -> int | None:
    """Of [D-]HH:MM:SS, as scontrol prints durations."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if not match:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return days * 86400 + hours * 3600 + minutes * 60 + seconds


def judge(run_dir: Path, options: Mapping[str, str]) -> Verdict:
    """Look at the run folder, decide, and write the decision down."""
    job, code = options["job"], int(options["code"])
    step, after = run_folder.newest_checkpoint_step(run_dir), int(options["after"])
    ending = Ending(
        done=run_folder.is_there(run_dir, run_folder.DONE),
        stop=run_folder.is_there(run_dir, run_folder.STOP),
        code=code,
        signal=options["signal"] if options.get("signal") in ("USR1", "TERM") else None,
        slurm=JobState.read(options.get("state", "")),
        ranks=tuple(run_folder.read_ranks(run_dir, after, float(options["since"]))),
        step=step,
        before=tuple(decision for decision in run_folder.read_decisions(run_dir) if decision.job == job),
        starts=sum(number > after for number in run_folder.start_numbers(run_dir)),
        restarts=int(options["restarts"]) if options.get("restarts", "").isdigit() else None,
    )
    verdict = decide(ending, Limits(int(options["max-restarts"]), int(options["max-without-progress"])))
    decision = Decision(time.time(), job, code, verdict.cause, verdict.reason, step, verdict.requeue, verdict.counted)
    try:
        run_folder.append_decision(run_dir, decision)
    except OSError as error:  # a full disk; the budget cannot be kept without the record
        if verdict.requeue and verdict.counted:
            return Verdict(False, f"{verdict.reason}; restarts.jsonl cannot be written: {error}", "disk", counted=True)
    return verdict


def read_options(arguments: Sequence[str]) -> dict[str, str]:
    """`--name value` pairs of a script of ours."""
    names, values = arguments[::2], arguments[1::2]
    if len(names) != len(values) or not all(name.startswith("--") for name in names):
        raise ValueError(f"expected pairs of --name value, found {' '.join(arguments)}")
    return {name[2:]: value for name, value in zip(names, values)}


def main(arguments: Sequence[str]) -> int:
    verdict = judge(Path(arguments[0]), read_options(arguments[1:]))
    print(("queued again: " if verdict.requeue else "ended: ") + verdict.reason, flush=True)
    return verdict.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
