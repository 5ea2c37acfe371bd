"""Signals that ask a run to save and leave."""

from __future__ import annotations

import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequest:
    """A flag the handlers raise and the loop reads between steps. Signals may come twice; the second changes nothing,
    except that a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.name: str | None = None

    def listen(self) -> StopRequest:
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name == "SIGINT":
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name

    def __bool__(self) -> bool:
        return self.name is not None
