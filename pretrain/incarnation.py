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

from configs.errors import UserError

_NAME = re.compile(r"(\d{6})\.json")


@dataclass(frozen=True)
class Incarnation:
    """One start of a run."""

    folder: Path
    number: int

    @classmethod
    def take(cls, run_dir: Path, world_size: int) -> Incarnation:
        """Become the newest start of this run. On rank 0 only."""
        folder = run_dir / "starts"
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"host": socket.gethostname(), "pid": os.getpid(), "time": time.time(), "ranks": world_size}
        number = _newest(folder) + 1
        while True:
            try:
                with (folder / f"{number:06d}.json").open("x") as file:
                    file.write(json.dumps(facts))
                    file.flush()
                    os.fsync(file.fileno())
                return cls(folder, number)
            except FileExistsError:  # another start was quicker
                number += 1

    def check(self) -> None:
        """Raise a UserError if another start has taken the run over since."""
        if (newest := _newest(self.folder)) <= self.number:
            return
        try:
            facts = json.loads((self.folder / f"{newest:06d}.json").read_text())
            who = f"on {facts['host']}, process {facts['pid']}, {time.strftime('%F %T', time.localtime(facts['time']))}"
        except (OSError, ValueError, KeyError):
            who = "just now"
        raise UserError(
            f"this run was started again ({who}; start {newest}, this is start {self.number})",
            f"one owner of {self.folder.parent}",
            "nothing to do: this older process writes nothing more and ends; the newer one goes on",
        )


def _newest(folder: Path) -> int:
    names = (_NAME.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return max((int(match[1]) for match in names if match), default=0)
