"""The fence between starts of one run: each takes the next number, and only the newest may write checkpoints.

starts/000001.json   who started, when and where; made with O_EXCL, so that no two starts hold the same number
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from configs.errors import DiskRefused, TakenOver
from parallel.checkpoint_write import write_refused

_NAME = re.compile(r"(\d{6})\.json")


@dataclass(frozen=True)
class Incarnation:
    """One start of a run."""

    folder: Path
    number: int
    record: str  # what stands in its file

    @classmethod
    def take(cls, run_dir: Path, world_size: int) -> Incarnation:
        """Become the newest start of this run. On rank 0 only.

        Raises:
            UserError: the run folder cannot be written.
        """
        try:
            return cls._take(run_dir / "starts", world_size)
        except OSError as error:
            raise write_refused(error, run_dir) from error

    @classmethod
    def _take(cls, folder: Path, world_size: int) -> Incarnation:
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), "ranks": world_size}
        record, number = json.dumps(facts), _newest(folder) + 1
        while True:
            try:
                with (folder / f"{number:06d}.json").open("x") as file:
                    file.write(record)
                    file.flush()
                    os.fsync(file.fileno())
                return cls(folder, number, record)
            except FileExistsError:  # another start was quicker
                number += 1

    def check(self) -> None:
        """Raise a UserError if another start has taken the run over since, or its folder is not the one it was."""
        own = self.folder / f"{self.number:06d}.json"
        if _read(own) != self.record:
            raise DiskRefused(
                f"{own}, which this start of the run wrote, is gone",
                f"{self.folder.parent} as it was when the run started",
                "see whether the folder was removed or its disk unmounted; then start again",
            )
        if (newest := _newest(self.folder)) == self.number:
            return
        try:
            facts = json.loads(_read(self.folder / f"{newest:06d}.json"))
            who = f"on {facts['host']}, process {facts['pid']}, {time.strftime('%F %T', time.localtime(facts['time']))}"
        except (ValueError, KeyError):
            who = "just now"
        raise TakenOver(
            f"this run was started again ({who}; start {newest}, this is start {self.number})",
            f"one owner of {self.folder.parent}",
            "this older process writes nothing more and ends. If the newer one has ended too, start again: the run "
            "goes on from its newest checkpoint",
        )


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _newest(folder: Path) -> int:
    names = (_NAME.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return max((int(match[1]) for match in names if match), default=0)
