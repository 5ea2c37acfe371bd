"""Stages that survive being killed: a stage is a list of tasks, each of which leaves a result file as its last act.

    work/<stage>/…            what its tasks leave; names are the tasks' own
    work/<stage>/<task>.json  the counts of one task: its presence says that the task is done
    work/<stage>/made_from.json  the configuration and files that decide its outcome: written first, removed first
    work/<stage>/stage.json   the counts of the whole stage: its presence says that the stage is done

A task is a pure function of the sources and of the files of earlier stages, so doing one again changes nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs.base import differences
from configs.errors import UserError
from data_prep.progress import Reporter
from data_prep.storage import remove, remove_temporary, write_atomically
from data_prep.workers import Workers

Counts = dict[str, Any]  # plain JSON values
STAGE, MADE_FROM = "stage.json", "made_from.json"


@dataclass(frozen=True)
class Task:
    """One piece of a stage: ``run(*arguments) -> Counts``.

    Attributes:
        name: of its result file.
        bytes: how much work it is, for progress.
    """

    name: str
    run: Callable[..., Counts]
    arguments: tuple[Any, ...]
    bytes: int = 0


@dataclass
class Workspace:
    """The folder of unfinished work, and who works there.

    Attributes:
        key: what the stages so far were made from; grows with each stage.
    """

    folder: Path
    workers: Workers
    reporter: Reporter
    key: dict[str, Any] = field(default_factory=dict)

    def open_stage(self, name: str, key: dict[str, Any]) -> Path:
        """The folder of a stage whose outcome `key` decides, together with the stages before it.

        Raises:
            UserError: it was begun with another key.
        """
        self.key = {**self.key, name: key}
        folder = self.folder / name
        path = folder / MADE_FROM
        if path.is_file():
            there = json.loads(path.read_bytes())
            if (folder / STAGE).is_file():
                refuse_other(there, self.key, str(folder))
            elif there != json.loads(_json(self.key)):  # begun only, by a configuration that was changed since
                remove_stage(folder)
        else:  # it is written first and removed first: without it, whatever is there is a half
            remove(folder)
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, _json(self.key))
        remove_temporary(folder)
        return folder

    def finished(self, name: str) -> Counts | None:
        """The counts of a stage that is done."""
        path = self.folder / name / STAGE
        return json.loads(path.read_bytes()) if path.is_file() else None

    def run(self, label: str, folder: Path, tasks: Sequence[Task]) -> list[Counts]:
        """Do the tasks that are not done; the counts of all, in their order."""
        left = [task for task in tasks if not _result(folder, task).is_file()]
        total = sum(task.bytes for task in tasks)
        with self.reporter.stage(label, total, total - sum(task.bytes for task in left)) as advance:
            calls = [(run_task, (task, folder)) for task in left]
            for number, _ in self.workers.run(calls):
                advance(left[number].bytes)
        return [json.loads(_result(folder, task).read_bytes()) for task in tasks]

    def close_stage(self, name: str, counts: Counts) -> Counts:
        """Say that a stage is done."""
        write_atomically(self.folder / name / STAGE, _json(counts))
        return counts


def run_task(task: Task, folder: Path) -> None:
    """Do one task: what a worker calls."""
    counts = task.run(*task.arguments)
    write_atomically(_result(folder, task), _json(counts))


def refuse_other(there: Any, wanted: Any, where: str) -> None:
    """
    Raises:
        UserError: the two trees differ; names the keys.
    """
    if found := [f"{key}: {a!r} there, {b!r} here" for key, a, b in differences(there, wanted)]:
        shown = "\n          ".join(_short(line) for line in found[:8])
        raise UserError(
            f"{where} was made from something else:\n          {shown}",
            "the same configuration and source files",
            "choose another output=PATH, restore these keys, or remake what they change with --redo",
        )


def remove_stage(folder: Path) -> None:
    """Remove a stage's folder; killed on the way, it leaves what `open_stage` takes for nothing."""
    (folder / MADE_FROM).unlink(missing_ok=True)
    remove(folder)


def changed_stages(folder: Path, wanted: dict[str, dict[str, Any]], order: Sequence[str]) -> list[str]:
    """The stages that are there with another key than the wanted one, and all that are there after the first such."""
    changed: list[str] = []
    key: dict[str, Any] = {}
    for name in order:
        key = {**key, name: wanted[name]}
        path = folder / name / MADE_FROM
        if changed or (path.is_file() and json.loads(path.read_bytes()) != json.loads(_json(key))):
            changed += [name] if (folder / name).exists() else []
    return changed


def add_counts(parts: Iterator[Counts] | Sequence[Counts]) -> Counts:
    """Sums, key by key, of counts and of trees of counts."""
    total: Counts = {}
    for part in parts:
        for key, value in part.items():
            if isinstance(value, dict):
                total[key] = add_counts([total.get(key, {}), value])
            else:
                total[key] = total.get(key, 0) + value
    return total


def _result(folder: Path, task: Task) -> Path:
    return folder / f"{task.name}.json"


def _short(line: str) -> str:
    return line if len(line) <= 200 else line[:197] + "..."


def _json(tree: Any) -> bytes:
    return json.dumps(tree, indent=1).encode() + b"\n"
