"""Samples that no step draws again, and the file that names them: RUN/blocklist.jsonl, or a configuration's own.

A line a sample: {"source", "sample", "dataset", "sequence_length", "seed"} say which, as the run that met it counted;
what else stands in the line (why, when, which documents) is for people.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from data_prep.storage import write_atomically

BLOCKLIST = "blocklist.jsonl"
_KINDS: tuple[tuple[str, type], ...] = (
    ("source", str),
    ("sample", int),
    ("dataset", str),
    ("sequence_length", int),
    ("seed", int),
)


@dataclass(frozen=True, order=True)
class Blocked:
    """Consecutive samples of one source. They are not drawn, nor is what is in them, ever after.

    Attributes:
        dataset: identity of the data that the source had.
        sequence_length, seed: with which the samples were counted; another run counts others.
        rollback: which of the run it was, from 1; 0 where a user gave the sample.
        first, last: their numbers, as the cursor counts.
    """

    source: str
    dataset: str
    sequence_length: int
    seed: int
    rollback: int
    first: int
    last: int

    @property
    def count(self) -> int:
        return self.last - self.first + 1


def united(entries: Iterable[Blocked]) -> list[Blocked]:
    """The same samples, each once, in one order and in as few entries as can be."""
    found: list[Blocked] = []
    for one in sorted(entries):
        last = found[-1] if found else None
        if last and _all_but_range(last) == _all_but_range(one) and one.first <= last.last + 1:
            found[-1] = Blocked(*_all_but_range(last), last.first, max(last.last, one.last))
        else:
            found.append(one)
    return found


def _all_but_range(one: Blocked) -> tuple[str, str, int, int, int]:
    return one.source, one.dataset, one.sequence_length, one.seed, one.rollback


def read_blocklist(path: Path, own: bool) -> list[Blocked]:
    """The samples that a file names.

    Args:
        own: it is the run's own, whose rollbacks count against its limit.

    Raises:
        UserError: it cannot be read, or a line is none.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"blocklist {path}: {error}", "a readable file", "check data.blocklist") from error
    return united(_parse(line, f"{path}:{number}", own) for number, line in enumerate(lines, 1) if line.strip())


def _parse(line: str, where: str, own: bool) -> Blocked:
    try:
        tree: Any = json.loads(line)
    except ValueError:
        tree = None
    wrong = [key for key, kind in _KINDS if not isinstance(tree, dict) or type(tree.get(key)) is not kind]
    if wrong or tree["sample"] < 0 or tree["sequence_length"] < 2:
        raise UserError(
            f"{where}: {line[:100]!r}" + (f", where {', '.join(wrong)} is missing or of another type" if wrong else ""),
            "a JSON object a line with " + ", ".join(f"{key} ({kind.__name__})" for key, kind in _KINDS),
            f"mend the line, or copy it again from the {BLOCKLIST} of the run that wrote it",
        )
    rollback = int(tree.get("rollback", 0)) if own else 0
    number = tree["sample"]
    return Blocked(tree["source"], tree["dataset"], tree["sequence_length"], tree["seed"], rollback, number, number)


def append_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to a blocklist: all of them are there, or none."""
    before = path.read_bytes() if path.exists() else b""
    write_atomically(path, before + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def to_json(entries: Iterable[Blocked]) -> list[dict[str, Any]]:
    return [asdict(one) for one in entries]


def from_json(tree: Iterable[dict[str, Any]]) -> list[Blocked]:
    return [Blocked(**one) for one in tree]
