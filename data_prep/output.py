"""The output folder: who may write it, what is in it, and how a corpus appears there part by part, its summary last."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.corpus import CorpusConfig
from configs.errors import UserError
from data_prep.format import TokenStream
from data_prep.manifest import MANIFEST
from data_prep.stages import refuse_other
from data_prep.storage import explain_write_errors, only_writer, remove, write_atomically
from data_prep.summary import SUMMARY, PrepSummary

WORK = "work"
MARK = "made-by-glam-prep"  # in WORK: says that it is ours, and may be removed
CONFIG = "corpus.yaml"
READY, ASSEMBLED = "ready", "assembled.json"  # in WORK: the parts to be published; a file that says that all are there
TRASH = ".removed-by-glam-prep"
# In the order they are published: the summary says "complete", so it comes last.
PARTS = ("tokenizer", "quality", "train", "heldout", "rejects", CONFIG, "data.yaml", SUMMARY)


def find_complete(output: Path, config: CorpusConfig, made_from: dict[str, str]) -> PrepSummary | None:
    """The corpus already there, if it is this one; None if there is none.

    Raises:
        UserError: another corpus stands there, or this one lost files since.
    """
    if not (output / SUMMARY).is_file():
        return None
    summary = PrepSummary.load(output)
    there = CorpusConfig.load(output / CONFIG)
    refuse_other(_by_name(there), _by_name(config), str(output))
    refuse_other(summary.made_from, made_from, str(output))
    for dataset in summary.datasets:
        folder = output / dataset.side / dataset.source
        if not (folder / MANIFEST).is_file():
            found = f"{folder} is gone or has no {MANIFEST}"
            expected = f"{dataset.tokens} tokens, as {SUMMARY} says"
            raise UserError(found, expected, "remake it with --redo, or choose another output=PATH")
        TokenStream(folder)  # raises on a truncated shard
    return summary


def _by_name(config: CorpusConfig) -> dict[str, object]:
    """What decides the result, with sources by name, so that a difference is told by its key."""
    tree = dict(config.makes)
    return {**tree, "sources": {source.name: source.model_dump(mode="json") for source in config.sources}} | {
        "order of sources": [source.name for source in config.sources]
    }


@contextmanager
def opened(output: Path, redo: bool) -> Iterator[Path]:
    """The workspace in ``output``, for one process at a time; what is in it stays when something fails.

    Raises:
        UserError: ``output`` holds files that are not ours, is being written, is full or forbidden.
    """
    created = [path for path in (output, *output.parents) if not path.exists()]
    with explain_write_errors(output):
        output.mkdir(parents=True, exist_ok=True)
        try:
            with only_writer(output):
                _refuse_foreign(output, redo)
                remove(output / TRASH)
                work = output / WORK
                work.mkdir(exist_ok=True)
                (work / MARK).touch()
                yield work
        except BaseException:
            if [path.name for path in (output / WORK).glob("*")] == [MARK]:
                (output / WORK / MARK).unlink()
            for path in (output / WORK, *created):
                try:
                    path.rmdir()  # only what is empty: nothing was done
                except OSError:
                    break
            raise


def say_assembled(work: Path, makes: str) -> None:
    """Say that all parts of the corpus of this fingerprint stand in READY."""
    parts = [part for part in PARTS if (work / READY / part).exists()]
    write_atomically(work / ASSEMBLED, json.dumps({"makes": makes, "parts": parts}).encode())


def is_assembled(work: Path, makes: str) -> bool:
    """Whether they do; what was made of another configuration does not count."""
    path = work / ASSEMBLED
    return path.is_file() and json.loads(path.read_bytes())["makes"] == makes


def forget_assembled(work: Path) -> None:
    """Something is made again: what stood ready is no longer what is wanted."""
    remove(work / ASSEMBLED)
    remove(work / READY)


def publish_parts(output: Path) -> None:
    """Give what stands ready its place; may be stopped anywhere and done again."""
    work = output / WORK
    parts = json.loads((work / ASSEMBLED).read_bytes())["parts"]
    if (work / READY / SUMMARY).exists():
        remove(output / SUMMARY)  # first: an older corpus is no longer complete
    for part in PARTS:
        if part not in parts:
            remove(output / part)
        elif (work / READY / part).exists():
            remove(output / part)
            os.replace(work / READY / part, output / part)
    _remove_work(output)


def remove_leftover(output: Path) -> None:
    """Remove the workspace behind a complete corpus, left by a run that was killed at its very end."""
    if (output / WORK / MARK).is_file() or (output / TRASH).is_dir():
        with contextlib.suppress(UserError, OSError), only_writer(output):
            _remove_work(output)


def _remove_work(output: Path) -> None:
    """Under another name first, so that no half of a workspace is ever taken for one."""
    remove(output / TRASH)
    if (output / WORK / MARK).is_file():
        os.replace(output / WORK, output / TRASH)
        remove(output / TRASH)


def _refuse_foreign(output: Path, redo: bool) -> None:
    """Only what we know to be ours is ever removed: `output` may be a folder of the user's, by mistake."""
    present = {path.name for path in output.iterdir()} - {TRASH}
    remedy = "choose another output=PATH"
    if foreign := sorted(present - {WORK, *PARTS}):
        raise UserError(f"{output} holds other files: {', '.join(foreign[:5])}", "a new or an empty folder", remedy)
    work = output / WORK
    marked = (work / MARK).is_file()
    if work.exists() and not marked and (not work.is_dir() or any(work.iterdir())):
        raise UserError(f"{work} is not of our making", "a new or an empty folder", remedy)
    if (ours := sorted(present - {WORK})) and not marked:
        if SUMMARY not in present:
            raise UserError(f"{output} holds {', '.join(ours[:5])}", "a new or an empty folder", remedy)
        PrepSummary.load(output)  # raises if it is not ours
    if SUMMARY in present and not redo:  # it was not when we looked, before we held the lock
        raise UserError(f"{output} was completed by another process just now", "one writer", "run this again")
