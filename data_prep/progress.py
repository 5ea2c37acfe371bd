"""Long work shows how far it is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table

_LINE_EVERY_S = 30.0


class Reporter:
    """Prints to a console, or to nobody. Times stages and keeps their durations in ``seconds``."""

    def __init__(self, console: Console | None) -> None:
        self._console = console
        self.seconds: dict[str, float] = {}

    def say(self, text: str) -> None:
        """Print one line."""
        if self._console is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def show(self, table: Table) -> None:
        """Print a table."""
        if self._console is not None:
            self._console.print(table)

    @contextmanager
    def stage(self, name: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
        """Time one stage; the function given advances it by bytes, of which ``total`` make the whole and ``done`` were
        made before."""
        begin = time.perf_counter()
        if self._console is not None and self._console.is_terminal:
            columns = (
                TextColumn("{task.description:<22}"),
                BarColumn(),
                TransferSpeedColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self._console, transient=True) as bar:
                task = bar.add_task(name, total=max(1, total), completed=done)
                yield lambda amount: bar.advance(task, amount)
        else:
            yield self._lines(name, total, done)
        self.seconds[name] = time.perf_counter() - begin
        before = f" ({done / max(1, total):.0%} was done before)" if done else ""
        self.say(f"{name}: {self.seconds[name]:.1f} s{before}")

    def _lines(self, name: str, total: int, done: int) -> Callable[[int], None]:
        last, held = time.perf_counter(), done

        def advance(amount: int) -> None:
            nonlocal last, held
            held += amount
            if (now := time.perf_counter()) - last >= _LINE_EVERY_S:
                last = now
                self.say(f"{name}: {held / max(1, total):.0%} of {total / 1e6:,.0f} MB")

        return advance
