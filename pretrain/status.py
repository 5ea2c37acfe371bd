"""RUN/ranks/rank-NNNNN.json: how each rank of the newest start fares, in its own words. Launchers' exit codes lie.

Written when a job starts a rank, when it has met the others, and when it ends by itself. One that says "running" and is
not was killed. While a rank lives the file's time goes on, from a thread of its own: a node whose files stand still is
gone, though nobody says so.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from configs.errors import Cause, RankFailed, UserError

State = Literal["running", "done", "stopped", "failed"]
FOLDER = "ranks"
DONE = "DONE"  # in the run folder: trained to the last step
STOP = "STOP"  # in the run folder: save, end, and do not come back
_ROOM = 2048  # bytes each word takes, so that on a disk without room a last one fits over the one before
BEAT_S = 5.0  # slurm/watch.py allows for five and more that are missed


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
    _ended: threading.Event = field(default_factory=threading.Event, repr=False)  # what it last said
    _file: int | None = field(default=None, repr=False)  # open, of the last word "running"

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
        text = json.dumps(facts).ljust(_ROOM) + "\n"
        self._ended.set()  # what beat so far beats for what is no longer true
        self._ended, kept, self._file = threading.Event(), self._file, None
        try:
            path.parent.mkdir(exist_ok=True)
            aside.write_text(text)
            self._file = os.open(aside, os.O_RDWR) if state == "running" else None
            os.replace(aside, path)
        except OSError:
            aside.unlink(missing_ok=True)
            if kept is not None and len(text) == _ROOM + 1:
                with contextlib.suppress(OSError):
                    os.pwrite(kept, text.encode(), 0)
        else:
            if self._file is not None:
                beat = (os.dup(self._file), self._ended)
                threading.Thread(target=_beat, args=beat, name="status beat", daemon=True).start()
        finally:
            if kept is not None:
                os.close(kept)


def _beat(number: int, ended: threading.Event) -> None:
    """By the open file, not by its name: that may be a newer start's by now, which must not seem alive for our sake."""
    try:
        while not ended.wait(BEAT_S):
            with contextlib.suppress(OSError):
                os.utime(number)
                if os.fstat(number).st_nlink == 0:
                    return
    finally:
        os.close(number)


@contextmanager
def starting_up(run_dir: Path, rank: int) -> Iterator[None]:
    """Puts a rank on record before it has met the others, and what ends it until then.

    Else a node that is gone before they have met would be missed by nobody until their time-out.
    """
    status = RankStatus(run_dir, rank)
    status.write("running", detail="starts up")
    try:
        yield
    except RankFailed:  # after they had met; it has been said
        raise
    except Exception as error:
        cause: Cause = error.cause if isinstance(error, UserError) else "unknown"
        status.write("failed", cause, " ".join(f"rank {rank}: {type(error).__name__}: {error}".split()))
        raise


def mark_done(run_dir: Path, step: int) -> None:
    """The run needs no further start."""
    aside = run_dir / f"{DONE}.tmp"
    aside.write_text(json.dumps({"step": step, "time": time.time()}) + "\n")
    os.replace(aside, run_dir / DONE)


def unmark_done(run_dir: Path) -> None:
    """There are more steps to make, after all."""
    (run_dir / DONE).unlink(missing_ok=True)
