"""RUN/ranks/rank-NNNNN.json: how each rank of the newest start fares, in its own words. Launchers' exit codes lie.

Written when a rank has met the others, and when it ends by itself. One that says "running" and is not was killed.
"""

from __future__ import annotations

import json
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configs.errors import Cause

State = Literal["running", "done", "stopped", "failed"]
FOLDER = "ranks"
DONE = "DONE"  # in the run folder: trained to the last step
STOP = "STOP"  # in the run folder: save, end, and do not come back


@dataclass
class RankStatus:
    """One rank's file.

    Attributes:
        start: number of the start of the run (RUN/starts).
        step: of training when it was written.
    """

    run_dir: Path
    rank: int
    start: int = 0
    step: int = 0

    def write(self, state: State, cause: Cause | None = None, detail: str = "") -> None:
        """Best effort: a disk that refuses must not hide what there was to say."""
        facts = {
            "start": self.start,
            "rank": self.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "state": state,
            "step": self.step,
            "cause": cause,
            "detail": detail,
            "time": time.time(),
        }
        path = self.run_dir / FOLDER / f"rank-{self.rank:05d}.json"
        aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            path.parent.mkdir(exist_ok=True)
            aside.write_text(json.dumps(facts) + "\n")
            os.replace(aside, path)
        except OSError:
            aside.unlink(missing_ok=True)


def mark_done(run_dir: Path, step: int) -> None:
    """The run needs no further start."""
    aside = run_dir / f"{DONE}.tmp"
    aside.write_text(json.dumps({"step": step, "time": time.time()}) + "\n")
    os.replace(aside, run_dir / DONE)


def unmark_done(run_dir: Path) -> None:
    """There are more steps to make, after all."""
    (run_dir / DONE).unlink(missing_ok=True)
