"""The output folder: who may write it, what is in it, and how a corpus appears there all at once."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from configs.errors import UserError
from data_prep.format import MANIFEST, TokenStream
from data_prep.storage import explain_write_errors, only_writer
from data_prep.summary import SUMMARY, PrepSummary

STAGING = ".partial"
# In the order they are published: the summary says "complete", so it comes last.
PARTS = ("tokenizer", "train", "heldout", "corpus.yaml", "rejects.jsonl", SUMMARY)


def find_complete(output: Path, fingerprint: str, source_state: str) -> PrepSummary | None:
    """The corpus already there, if it is this one; None if there is none.

    Raises:
        UserError: another corpus stands there, or this one lost files since.
    """
    if not (output / SUMMARY).is_file():
        return None
    summary = PrepSummary.load(output)
    remedy = f"choose another output=PATH, or delete {output}"
    if summary.fingerprint != fingerprint:
        found = f"{output} holds a corpus of configuration {summary.fingerprint}"
        raise UserError(found, f"configuration {fingerprint} (see {output / 'corpus.yaml'})", remedy)
    if summary.source_state != source_state:
        found = f"{output} was prepared from source files of state {summary.source_state}"
        raise UserError(found, f"state {source_state}: files were added, removed or changed since", remedy)
    for dataset in summary.datasets:
        folder = output / dataset.side / dataset.source
        if not (folder / MANIFEST).is_file():
            found = f"{folder} is gone or has no {MANIFEST}"
            raise UserError(found, f"{dataset.tokens} tokens, as {SUMMARY} says", remedy)
        TokenStream(folder)  # raises on a truncated shard
    return summary


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A fresh folder in ``output`` to build in; published when the block ends well, else removed without trace.

    Raises:
        UserError: ``output`` holds files that are not ours, is being written, is full or forbidden.
    """
    created = [path for path in (output, *output.parents) if not path.exists()]
    with explain_write_errors(output), ExitStack() as stack:
        output.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(only_writer(output))
            _refuse_foreign(output)
            _remove_ours(output)  # what an interrupted run left
            staging = output / STAGING
            staging.mkdir()
            try:
                yield staging
                for part in PARTS:
                    if (staging / part).exists():
                        os.replace(staging / part, output / part)
                shutil.rmtree(staging)
            except BaseException:
                _remove_ours(output)
                raise
        except BaseException:
            for path in created:
                try:
                    path.rmdir()
                except OSError:
                    break  # something else is in it by now
            raise


def _refuse_foreign(output: Path) -> None:
    """Only names we write are ever removed: `output` may be a folder of the user's, by mistake."""
    present = {path.name for path in output.iterdir()}
    remedy = "choose another output=PATH"
    if foreign := sorted(present - {STAGING, *PARTS}):
        raise UserError(f"{output} holds other files: {', '.join(foreign[:5])}", "a new or an empty folder", remedy)
    if SUMMARY in present:  # it was not when we looked, before we held the lock
        raise UserError(f"{output} was completed by another process just now", "one writer", "run this again")


def _remove_ours(output: Path) -> None:
    for name in (STAGING, *PARTS):
        path = output / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
