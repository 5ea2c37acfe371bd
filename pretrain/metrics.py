"""Where figures go: metrics.jsonl, TensorBoard, and a live line on the terminal. Rank 0 only.

metrics.jsonl holds one object a line: {"kind": "train" | "eval" | "event", "step", ...}. A resumed run first drops
what lies beyond the checkpoint it resumes from, so that no step appears twice.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from configs.errors import DiskRefused
from pretrain.goodput import LedgerFile
from pretrain.metrics_file import drop_after


class Metrics:
    """Sinks of one run."""

    def __init__(
        self, run_dir: Path, from_step: int, total_steps: int, console: Console | None = None, start: int = 1
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._ledger = LedgerFile(run_dir, start)
        self._run_dir = run_dir
        self._open(from_step)
        self._console = console or Console(stderr=False)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[shown]}", markup=False),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=from_step, shown="")
        self._progress.start()

    def _open(self, from_step: int) -> None:
        path = self._run_dir / "metrics.jsonl"
        drop_after(path, from_step)
        self._file = path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(self._run_dir / "tensorboard"), purge_step=from_step + 1)

    def go_back(self, step: int) -> None:
        """Forget what lies beyond `step`: the run goes on from there again."""
        self._file.close()
        self._board.close()
        self._open(step)
        self.advance(step)

    def write(self, kind: str, step: int, figures: dict[str, Any]) -> None:
        """Append one record; numbers also go to TensorBoard as kind/name.

        Raises:
            DiskRefused: the run folder takes no more.
        """
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, "time": time.time(), **figures}) + "\n")
            self._file.flush()
            self._ledger.note(kind, figures)
            for name, value in figures.items():
                if isinstance(value, int | float):
                    self._board.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:
            raise DiskRefused(
                f"{self._run_dir / 'metrics.jsonl'} cannot be written: {error.strerror or error}",
                "a run folder that can be written",
                "free space, raise the quota or mend the disk; started again, it goes on from the newest checkpoint",
            ) from error

    def advance(self, step: int) -> None:
        self._progress.update(self._task, completed=step)

    def show(self, step: int, line: str) -> None:
        """The live line of a terminal, or a line of a log file."""
        self._progress.update(self._task, completed=step, shown=line)
        if not self._console.is_terminal:
            self._console.print(f"step {step}  {line}", highlight=False, soft_wrap=True, markup=False)

    def say(self, message: str) -> None:
        """A line that stays."""
        self._console.print(message, highlight=False, soft_wrap=True, markup=False)

    def close(self) -> None:
        self._progress.stop()
        self._ledger.close()
        self._file.close()
        self._board.close()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(*[OSError] if error else []):  # what the block ended for is to be told, not this
            self.close()
