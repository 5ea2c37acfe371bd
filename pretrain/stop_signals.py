"""Signals that ask a run to save and leave."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """A flag the handlers raise and the loop reads between steps. Signals may come twice; the second changes nothing,
    except that a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._file: Path | None = None

    def watch_for(self, file: Path) -> None:
        """Also stop when this file is there: how a run without a scheduler is asked to."""
        self._file = file

    def listen(self) -> StopRequest:
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def __bool__(self) -> bool:
        if self.name is None and self._file is not None and self._file.exists():
            self.name = f"the file {self._file}"
        return self.name is not None
