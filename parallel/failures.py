"""One error told first, and every rank ended soon after: over the store the ranks met at, beside all groups."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
import traceback

import torch.distributed as dist
from torch.distributed import distributed_c10d

from configs.errors import UserError

POLL_S = 1.0
RANK_0_GONE = "rank 0, which keeps the store, is gone without a word (killed? out of memory?)"
GRACE_S = 10.0  # that a rank has to end by itself once another has failed
_LOST_CONTACT = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed out|socket timeout|recvmsg|sendmsg|NCCL|store", re.IGNORECASE
)


class Watch:
    """Lets a rank say that it failed and hear of others; made after the ranks have met.

    A thread asks the store about failures. A rank that hears of one ends within `GRACE_S`, wherever its own work is
    stuck: a collective on a GPU would otherwise wait out its time-out.
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

    def tell(self, error: BaseException) -> str:
        """Record this rank's failure; returns what it should print: its error if it is the first, else why it ends."""
        self._ending.set()
        lost_contact = not isinstance(error, UserError) and _is_lost_contact(error)
        mine = f"rank {self.rank}: {_one_line(error)}"
        first = self._first(mine, wait_s=3.0 if lost_contact else 0.0)
        # The first is to be read first; and rank 0 keeps the store, from which others learn why they end.
        time.sleep(2.0 if self.rank == 0 else 0.0 if first == mine else 1.0)
        if first == mine:
            if isinstance(error, UserError):
                return f"\n{error}\n"
            if lost_contact:
                return (
                    f"rank {self.rank} lost contact with another rank, which ended without a word (killed? out of "
                    f"memory?) or hangs\n  {_one_line(error)}\n  {_where(error)}"
                )
            told = "".join(traceback.format_exception(error)).rstrip()
            return f"rank {self.rank} failed, and ends the run:\n{told}"
        if isinstance(error, UserError) and first.endswith(_one_line(error)):
            return ""  # every rank met the same; one tells it
        return f"rank {self.rank} ends, as {first}"

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
        os._exit(1)


def _is_lost_contact(error: BaseException) -> bool:
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
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
