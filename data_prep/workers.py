"""Who does the work: this process, a pool of processes, or the ranks of an MPI job (mpiexec, srun --mpi=pmi2).

Tasks are functions of their arguments that leave their results in files, so who does one, and in which order, cannot be
seen in the outcome.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any

from configs.errors import UserError

Call = tuple[Callable[..., Any], tuple[Any, ...]]

_WAITING_A_WORKER = 2  # one in work, one on its way: the rest stays here, so that memory does not grow with the corpus


class Workers:
    """Runs calls; `count` at the same time."""

    def __init__(self, executor: ProcessPoolExecutor | Any | None, count: int) -> None:
        self._executor, self.count = executor, count

    def run(self, calls: Sequence[Call]) -> Iterator[tuple[int, Any]]:
        """Yield (number of the call, what it returned) as they end. The first error ends the rest.

        Raises:
            UserError: a worker process died.
        """
        if self._executor is None:
            yield from ((number, function(*arguments)) for number, (function, arguments) in enumerate(calls))
            return
        running: dict[Future[Any], int] = {}
        ahead = iter(enumerate(calls))
        try:
            while True:
                while len(running) < self.count * _WAITING_A_WORKER and (following := next(ahead, None)):
                    number, (function, arguments) = following
                    running[self._executor.submit(function, *arguments)] = number
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(done), done.result()
        except BrokenProcessPool:
            raise UserError(
                "a worker process died",
                f"{self.count} processes with about 1 GiB of memory each",
                "set workers=1, or give more memory; what is done is kept, the same command goes on from it",
            ) from None
        finally:
            for future in running:
                future.cancel()


@contextmanager
def make_workers(count: int, mpi: bool) -> Iterator[Workers | None]:
    """Workers for the length of a block. Under MPI every rank comes here; None where a rank has only served the first.

    Args:
        count: processes of this machine; where MPI says how many there are, that counts.
    """
    if mpi and _mpi_ranks() > 1:
        yield from _mpi_workers()
    elif count == 1:
        yield Workers(None, 1)
    else:
        # Spawn: forking a process that has threads (a progress display, a BLAS) may deadlock.
        pool = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), initializer=_end_with_parent)
        try:
            yield Workers(pool, count)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _mpi_ranks() -> int:
    from mpi4py import MPI  # late: importing it starts MPI

    return int(MPI.COMM_WORLD.Get_size())


def _mpi_workers() -> Iterator[Workers | None]:
    from mpi4py import MPI
    from mpi4py.futures import MPICommExecutor

    with MPICommExecutor(MPI.COMM_WORLD, root=0) as executor:
        yield Workers(executor, _mpi_ranks() - 1) if executor is not None else None


def _end_with_parent() -> None:
    """A parent that is killed cannot stop its pool, whose processes would wait for work for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
