"""The output folder: who may write it, what is in it, and how a corpus appears there part by part, its summary last."""

from __future__ import annotations

import os
import shutil
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
READY, ASSEMBLED = "ready", "assembled"  # in WORK: the parts to be published; a file that says that all are there
# In the order they are published: the summary says "complete", so it comes last.
PARTS = ("tokenizer", "quality", "train", "heldout", "rejects", CONFIG, "data.yaml", SUMMARY)


def find_complete(output: Path, config: CorpusConfig, source_state: str) -> PrepSummary | None:
    """The corpus already there, if it is this one; None if there is none.

    Raises:
        UserError: another corpus stands there, or this one lost files since.
    """
    if not (output / SUMMARY).is_file():
        return None
    summary = PrepSummary.load(output)
    there = CorpusConfig.load(output / CONFIG)
    refuse_other(_by_name(there), _by_name(config), str(output))
    refuse_other({"source files": summary.source_state}, {"source files": source_state}, str(output))
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
                work = output / WORK
                if not (work / ASSEMBLED).is_file():  # then no part can be of this workspace
                    for name in PARTS:
                        remove(output / name)
                work.mkdir(exist_ok=True)
                write_atomically(work / MARK, b"")
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


def publish_parts(output: Path, assembled: Path) -> None:
    """Give what stands ready its place; may be stopped anywhere and done again."""
    for part in PARTS:
        if (assembled / part).exists():
            remove(output / part)
            os.replace(assembled / part, output / part)
    shutil.rmtree(output / WORK, ignore_errors=True)  # whoever comes next removes what is left


def _refuse_foreign(output: Path, redo: bool) -> None:
    """Only names we write are ever removed: `output` may be a folder of the user's, by mistake."""
    present = {path.name for path in output.iterdir()}
    remedy = "choose another output=PATH"
    if foreign := sorted(present - {WORK, *PARTS}):
        raise UserError(f"{output} holds other files: {', '.join(foreign[:5])}", "a new or an empty folder", remedy)
    if ours := sorted(present - {WORK}):
        trace = (output / CONFIG).is_file() or (output / WORK).is_dir() or (output / SUMMARY).is_file()
        if not trace:
            raise UserError(f"{output} holds {', '.join(ours[:5])}", "a new or an empty folder", remedy)
    work = output / WORK
    if work.exists() and not (work / MARK).is_file() and any(work.iterdir()):
        raise UserError(f"{work} is not of our making", "a new or an empty folder", remedy)
    if SUMMARY in present and not redo:  # it was not when we looked, before we held the lock
        raise UserError(f"{output} was completed by another process just now", "one writer", "run this again")
