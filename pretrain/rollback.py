"""Going back to the last good checkpoint, with the samples that led astray on the blocklist.

PaLM restarted about 100 steps before a spike and skipped 200 to 500 batches, and saw no spike from the same data at
another state (arXiv:2204.02311, sec. 5.1). Here the skipped batches are those judged unfit, so that the run becomes, to
the bit, the one that never had them.

Order matters, as a process may end anywhere: later checkpoints go first, the blocklist is written next. Before that the
run comes to the same row of unfit steps again; after it every start reads the file.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.errors import TrainingDiverged, UserError
from parallel.checkpoint_write import write_refused
from parallel.collectives import raise_together, same_on_all_ranks
from pretrain.blocklist import BLOCKLIST, Blocked, append_lines, read_blocklist, united
from pretrain.build import Run
from pretrain.checkpoint import Restored
from pretrain.health import BadStep

_TOLD_ORIGINS = 5  # source documents named in the log; the file has all


def take_up_blocklist(run: Run) -> None:
    """Put together what the checkpoint, the run folder and the configuration know. All ranks call it together."""
    found, error, path = list[Blocked](), None, Path(run.config.run_dir) / BLOCKLIST
    if run.metrics and path.exists():
        try:
            found = read_blocklist(path, own=True)
        except UserError as met:
            error = met
    raise_together(error)
    run.sampler.block([*run.state.blocklist, *same_on_all_ranks(found)])
    run.state.blocklist = list(run.sampler.blocklist)


def roll_back(run: Run) -> dict[str, Any]:
    """Make the run what it was at the last checkpoint before its row of unfit steps, which it will not draw again.
    All ranks call it together. Returns what there is to tell of it.

    Raises:
        TrainingDiverged: it went back too often, or there is nothing to go back to.
    """
    state, row = run.state, run.state.row
    number, left = state.rollbacks + 1, state.step
    told = describe(row)
    if number > run.config.train.health.max_rollbacks:
        raise TrainingDiverged(
            f"{told}; the run went back {state.rollbacks} time(s) already",
            f"at most train.health.max_rollbacks={run.config.train.health.max_rollbacks} rollbacks",
            "if the documents differ each time, it is not the data: lower the learning rate or train.clip_norm, or "
            f"begin from an older checkpoint; if they are alike, look at {BLOCKLIST} and clean the data. A larger "
            "train.health.max_rollbacks lets the run go on",
        )
    blocked = united(replace(one, rollback=number) for bad in row for one in bad.samples)
    restored = _restore(run, told)
    origins = _write_down(run, row, number)
    if restored is None:
        raise TrainingDiverged(
            f"{told}, and no checkpoint is older than that",
            "a checkpoint to go back to",
            f"start again: the run begins anew without these samples, which are in {BLOCKLIST} now. If it comes to "
            "this each time, it is not the data: lower the learning rate, warm up longer, or save more often",
        )
    known = [*state.blocklist, *blocked]
    state.become(restored.state)
    run.sampler.resume(state.cursor)
    run.sampler.block(known)
    state.cursor, state.blocklist = run.sampler.cursor, list(run.sampler.blocklist)
    return {
        "event": "rolled_back",
        "rollback": number,
        "from_step": left,
        "lost_steps": left - state.step,
        "checkpoint": str(restored.folder),
        "verify_s": restored.verify_s,
        "load_s": restored.load_s,
        "step_seconds": state.seconds,
        "unfit": [
            {"step": one.step, "reason": one.reason, "loss": one.loss, "grad_norm": one.grad_norm} for one in row
        ],
        "samples": sum(one.count for one in blocked),
        "documents": len(origins),
        "origins": origins[:_TOLD_ORIGINS],
        "told": told,
    }


def describe(row: list[BadStep]) -> str:
    """One line of why."""
    reasons = ", ".join(dict.fromkeys(bad.reason for bad in row))
    last = row[-1]
    steps = f"step {last.step} was" if len(row) == 1 else f"steps {row[0].step} to {last.step} were"
    return f"{steps} unfit to apply: {reasons} (at the last, loss {last.loss}, gradient norm {last.grad_norm})"


def _restore(run: Run, told: str) -> Restored | None:
    try:
        return run.checkpoints.go_back(run.engine, run.state.last_fit_step)
    except UserError as error:
        if type(error) is not UserError:  # of the disk, or another start: a cause of its own
            raise
        raise TrainingDiverged(f"{told}, and going back failed: {error.found}", error.expected, error.remedy) from error


def _write_down(run: Run, row: list[BadStep], number: int) -> list[str]:
    """Append the samples and their documents to RUN/blocklist.jsonl; returns the origins on rank 0."""
    error, origins = None, list[str]()
    if run.metrics:
        rows = [line for bad in row for line in lines_of(run, bad, number)]
        origins = list(dict.fromkeys(document["origin"] for line in rows for document in line["documents"]))
        path = Path(run.config.run_dir) / BLOCKLIST
        try:
            append_lines(path, rows)
        except UserError as met:
            error = met
        except OSError as met:
            error = write_refused(met, path)
    raise_together(error)
    return origins


def lines_of(run: Run, bad: BadStep, number: int) -> list[dict[str, Any]]:
    """A step's samples as lines of the file."""
    from pretrain.explain import documents_of  # tokenizers, which nothing else in training needs

    lines = []
    for one in bad.samples:
        for sample in range(one.first, one.last + 1):
            documents = [
                {
                    "origin": seen.origin,
                    "shard": seen.shard,
                    "document": seen.document,
                    "first_token": seen.first_token,
                    "tokens": seen.tokens,
                    "first_line": seen.first_line,
                }
                for seen in documents_of(run.sampler, one.source, sample)
            ]
            which = {"dataset": one.dataset, "sequence_length": one.sequence_length, "seed": one.seed}
            why = {"rollback": number, "step": bad.step, "reason": bad.reason}
            lines.append({"source": one.source, "sample": sample, **which, **why, "documents": documents})
    return lines


def announcement(event: dict[str, Any]) -> str:
    """A rollback in one line."""
    more = event["documents"] - len(event["origins"])
    return (
        f"{event['told']}. Going back {event['lost_steps']} step(s) to {event['checkpoint']} (rollback "
        f"{event['rollback']}); {event['samples']} sample(s) will not be drawn again, of "
        + ", ".join(event["origins"])
        + (f" and {more} more; see {BLOCKLIST}" if more > 0 else "")
    )
