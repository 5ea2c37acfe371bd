"""What stages know of each document: a row a document and unit, and a fate a stage.

A unit's documents are numbered from 0 in reading order; records that could not be read have no row.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from configs.corpus import CorpusConfig, SourceSpec, TextTree
from configs.errors import UserError
from data_prep.readers import Document, read_unit
from data_prep.rules import normalize
from data_prep.storage import write_atomically
from data_prep.units import Unit

KEPT = 0  # the fate of a document that goes on; what other numbers mean is each stage's own
# digest: seeded, of the cleaned text; `side` chooses train or held-out, `order` the place in the shuffle.
ROW = np.dtype([
    ("side", "<u8"), ("order", "<u8"), ("file", "<u4"), ("record", "<u8"), ("bytes", "<u4"),
])  # fmt: skip
Rows = npt.NDArray[np.void]


@dataclass(frozen=True)
class Job:
    """What a task of any stage gets: the corpus and one unit of it.

    Attributes:
        work: the workspace's folder.
        stages: those before this one that decide which documents are left.
    """

    config: CorpusConfig
    work: Path
    unit: Unit
    stages: tuple[str, ...] = ()

    @property
    def source(self) -> SourceSpec:
        return self.config.sources[self.unit.source]

    def path(self, stage: str, ending: str) -> Path:
        """Of this unit's file in a stage's folder."""
        return self.work / stage / f"{self.unit.name}.{ending}"

    def rows(self) -> Rows:
        """This unit's documents."""
        return np.load(self.path("clean", "rows.npy"))  # type: ignore[no-any-return]

    def left(self) -> npt.NDArray[np.bool_]:
        """Which of them are still there after `stages`: [documents]."""
        fates = [np.load(self.path(stage, "fates.npy")) for stage in self.stages]
        return np.logical_and.reduce([fate == KEPT for fate in fates])  # type: ignore[no-any-return]


def digest(data: bytes, seed: int) -> tuple[int, int]:
    """Two independent 64-bit numbers of a text's UTF-8."""
    value = xxhash.xxh3_128_intdigest(data, seed=seed)
    return value >> 64, value & (2**64 - 1)


def cleaned(config: CorpusConfig, document: Document) -> str:
    """The text that counts, from the text that was read."""
    return normalize(document.text, config.clean.unicode, config.clean.control_characters)


def left_documents(job: Job, rows: Rows, left: npt.NDArray[np.bool_]) -> Iterator[tuple[int, str, bytes]]:
    """(number, cleaned text, its UTF-8) of the documents still there, read again from the source.

    Raises:
        UserError: the source is no longer what it was.
    """
    source, number = job.source, -1
    changed = UserError(
        f"source {source.name!r} changed while it was read ({job.unit.files[0][1]})",
        "files that stay as they are",
        "let the files rest, then run again with --redo",
    )
    sides, orders = rows["side"].tolist(), rows["order"].tolist()
    records = (r for r in read_unit(source, job.unit, job.config.max_document_bytes) if isinstance(r, Document))
    for number, document in enumerate(records):
        if number >= len(rows):
            raise changed
        if left[number]:
            text, expected = document.text, (sides[number], orders[number])
            data = text.encode("utf-8")
            if digest(data, job.config.seed) != expected:  # else cleaning had nothing to change
                text = cleaned(job.config, document)
                data = text.encode("utf-8")
                if digest(data, job.config.seed) != expected:
                    raise changed
            yield number, text, data
    if number + 1 != len(rows):
        raise changed


def heldout_limit(config: CorpusConfig) -> int:
    """Documents whose `side` is below it are held out."""
    return int(config.heldout_fraction * 2**64)


def origin(config: CorpusConfig, unit: Unit, file: int, record: int) -> str:
    """A record's place as people write it: the file, or file:line, or file:row, counted from 1."""
    path = unit.path(file)
    return path if isinstance(config.sources[unit.source], TextTree) else f"{path}:{record + 1}"


def reject_line(config: CorpusConfig, unit: Unit, place: tuple[int, int], rule: str, reason: str, **more: str) -> bytes:
    """A line of `rejects/STAGE.jsonl`, the same in every stage.

    Args:
        place: file and record.
    """
    where = {"source": config.sources[unit.source].name, "origin": origin(config, unit, *place)}
    return json.dumps({**where, "rule": rule, "reason": reason, **more}).encode() + b"\n"


def save_unit(work: Path, unit: Unit) -> None:
    """Keep a unit where stages find it that meet its documents from elsewhere."""
    write_atomically(work / "read" / f"{unit.name}.unit.json", json.dumps(dataclasses.asdict(unit)).encode())


@lru_cache(maxsize=64)
def load_unit(work: Path, number: int) -> Unit:
    """The unit of this number, as `save_unit` left it."""
    tree = json.loads((work / "read" / f"{Unit(number, 0, ()).name}.unit.json").read_bytes())
    return Unit(**{**tree, "files": tuple((n, path) for n, path in tree["files"])})
