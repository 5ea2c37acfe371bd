"""One error told first, and every rank ended soon after: over the store the ranks met at, beside all groups."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist
from torch.distributed import distributed_c10d

from configs.errors import EXIT_BAD_INPUT, EXIT_FAILED, RankFailed, UserError
from parallel import groups

POLL_S = 1.0
RANK_0_GONE = "rank 0, which keeps the store, is gone without a word (killed? out of memory?)"
GRACE_S = 10.0  # that a rank has to end by itself once another has failed
_LOST_CONTACT = re.compile(
    r"connection (closed|reset|refused)|broken pipe|time(d )?out|socket|recvmsg|sendmsg|remote (process|error|peer)",
    re.IGNORECASE,
)


@contextmanager
def working_together(rank: int, world_size: int) -> Iterator[None]:
    """What ranks do after they have met. Leaves all groups at the end; if it fails on any rank, on all.

    Raises:
        RankFailed: with this rank's exit code; what it has to say is said.
    """
    watch = Watch(rank, world_size)
    try:
        yield
        groups.wait_for_all()  # still watched: a rank may fail on its last line
        watch.stop()
        groups.leave()
    except Exception as error:
        # No group is left in order: with a rank gone, that could wait for ever.
        watch.tell(error)
        raise RankFailed(EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAILED) from error


class Watch:
    """Lets a rank say that it failed and hear of others; made after the ranks have met.

    A thread asks the store about failures. A rank that hears of one ends within `GRACE_S`, wherever its own work is
    stuck: a collective on a GPU would otherwise wait out its time-out. A rank that is killed on a GPU machine says
    nothing and closes no connection NCCL looks at: there the launcher ends the job (srun: --kill-on-bad-exit).
    """

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self._ending, self._heard = rank, threading.Event(), ""
        self._store = None
        if world_size > 1:
            # A connection of its own: a thread that waits must not block the main one.
            store = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
            self._store = dist.PrefixStore("failures", store)  # type: ignore[attr-defined]
            threading.Thread(target=self._listen, name="failure watch", daemon=True).start()

    def stop(self) -> None:
        """Before a regular end: from now on a rank that is gone is no failure."""
        self._ending.set()

    def tell(self, error: BaseException) -> None:
        """Record this rank's failure and say it, if it is the first; else say why this rank ends."""
        self._ending.set()
        mine = f"rank {self.rank}: {_one_line(error)}"
        lost_contact = _is_lost_contact(error)
        first = self._first(mine, wait_s=3.0 if lost_contact else 0.0)
        if first == mine:
            told = self._told_first(error, lost_contact)
        elif isinstance(error, UserError) and first.endswith(_one_line(error)):
            told = ""  # every rank met the same; one tells it
        else:
            time.sleep(1.0)  # the first is to be read first
            told = f"rank {self.rank} ends, as {first}"
        if told:
            print(told, file=sys.stderr, flush=True)
        if self.rank == 0 and self._store is not None:
            time.sleep(2.0)  # the store goes with this rank: others are to learn from it why they end

    def _told_first(self, error: BaseException, lost_contact: bool) -> str:
        if isinstance(error, UserError):
            return f"\n{error}\n"
        if lost_contact:
            return (
                f"rank {self.rank} lost contact with another rank, which ended without a word (killed? out of "
                f"memory?) or hangs\n  {_one_line(error)}\n  {_where(error)}"
            )
        told = "".join(traceback.format_exception(error)).rstrip()
        return f"rank {self.rank} failed, and ends the run:\n{told}"

    def _first(self, mine: str, wait_s: float) -> str:
        """The first failure on record, which is `mine` if there was none."""
        if self._store is None:
            return mine
        try:
            deadline = time.monotonic() + wait_s
            while time.monotonic() < deadline and not self._store.check(["first"]):
                time.sleep(0.1)
            found: bytes = self._store.compare_set("first", "", mine)
            return found.decode()
        except Exception:
            return (self._heard or RANK_0_GONE) if wait_s else mine

    def _listen(self) -> None:
        assert self._store is not None
        while not self._heard and not self._ending.wait(POLL_S):
            try:
                if self._store.check(["first"]):
                    self._heard = self._store.get("first").decode()
            except Exception:
                self._heard = RANK_0_GONE
        if not self._heard or self._ending.wait(GRACE_S):
            return
        print(f"rank {self.rank} ends, as {self._heard}", file=sys.stderr, flush=True)
        os._exit(EXIT_FAILED)


def _is_lost_contact(error: BaseException) -> bool:
    return isinstance(error, RuntimeError) and bool(_LOST_CONTACT.search(str(error)))


def _one_line(error: BaseException) -> str:
    text = re.sub(r"\[/[^]]*\] ", "", str(error)).strip()  # gloo begins with a path of the machine it was built on
    first = re.split(r"\n|\. This is typically", text)[0]
    return f"{type(error).__name__}: {first}"[:300]


def _where(error: BaseException) -> str:
    """The innermost line of the project that was running."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    return f"in {own[-1].name}, {own[-1].filename}:{own[-1].lineno}" if own else ""
