"""What a person sees while a corpus is prepared: a bar on a terminal, one line a stage elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Reporter:
    """Shows stages and keeps their durations in ``seconds``."""

    def __init__(self, console: Console | None) -> None:
        self._console = console
        self.seconds: dict[str, float] = {}

    def say(self, text: str) -> None:
        """Print one line."""
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
        """Time one stage; the function given advances its bar by units of which ``total`` make the whole."""
        begin = time.perf_counter()
        if self._console is not None and self._console.is_terminal:
            columns = (TextColumn("{task.description:<22}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            with Progress(*columns, console=self._console, transient=True) as bar:
                task = bar.add_task(name, total=total)
                yield lambda amount: bar.advance(task, amount)
        else:
            yield lambda amount: None
        self.seconds[name] = time.perf_counter() - begin
        self.say(f"{name}: {self.seconds[name]:.1f} s")
