"""A thread of each rank that hears of failures elsewhere, shows that this rank lives, and notices that it hangs.

It talks over the store the ranks met at. Where the main thread is stuck (a collective on a GPU waits out its time-out
for a rank that is gone) the thread ends the process itself.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from configs.errors import EXIT_FAILED, Cause
from parallel.stacks import dump_stacks, main_thread_waits_for

POLL_S = 1.0
_COLLECT_S = 5.0  # that ranks have to say where they are, once one hangs


@dataclass(frozen=True)
class WatchSettings:
    """
    Attributes:
        hang_s: without progress for so long, a rank counts as hanging; None: never. Begins with the first progress.
        silent_s: a rank whose beat is missed for so long counts as gone.
        stacks: the folder for RANK.stack.txt of ranks that hang; None: nowhere.
    """

    hang_s: float | None = None
    silent_s: float = 60.0
    stacks: Path | None = None


@dataclass(frozen=True)
class Failure:
    """The first failure of a job."""

    rank: int
    cause: Cause
    text: str  # one line

    def encode(self) -> str:
        return json.dumps([self.rank, self.cause, self.text])

    @classmethod
    def decode(cls, data: bytes) -> Failure:
        return cls(*json.loads(data))


RANK_0_GONE = Failure(0, "node", "rank 0, which keeps the store, is gone without a word (killed? out of memory?)")


class Watch:
    """Made after the ranks have met.

    Args:
        grace_s: that this rank's main thread has to end by itself once another rank has failed.
        ending: told what this process ends for, right before the thread ends it.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        settings: WatchSettings,
        grace_s: float,
        ending: Callable[[Failure], None],
    ) -> None:
        self.rank, self.world_size, self.settings, self.grace_s = rank, world_size, settings, grace_s
        self._tell_ending, self._ending = ending, threading.Event()
        self._heard: Failure | None = None
        self._progress: float | None = None
        self._doing = ""
        self._beats: dict[int, tuple[bytes, float]] = {}  # on rank 0: rank -> its last beat, when it was new
        self._store: Any = None
        if world_size > 1:
            # A connection of its own: a thread that waits must not block the main one.
            store = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
            store.set_timeout(timedelta(seconds=settings.silent_s))  # a store that does not answer is a rank 0 gone
            self._store = dist.PrefixStore("failures", store)  # type: ignore[attr-defined]
        self._round = time.monotonic()  # when the thread last got answers from the store
        if world_size > 1 or settings.hang_s is not None:
            threading.Thread(target=self._run, name="failure watch", daemon=True).start()
        if world_size > 1 and rank > 0:
            threading.Thread(target=self._guard, name="failure guard", daemon=True).start()

    def progress(self, doing: str) -> None:
        """The main thread goes on: what it does now."""
        self._progress, self._doing = time.monotonic(), doing

    def stop(self) -> None:
        """Before a regular end: from now on a rank that is gone is no failure."""
        self._ending.set()

    def first(self, mine: Failure, wait_s: float) -> Failure:
        """The first failure on record, which is `mine` if there was none."""
        if self._store is None:
            return mine
        try:
            deadline = time.monotonic() + wait_s
            while time.monotonic() < deadline and not self._store.check(["first"]):
                time.sleep(0.1)
            return Failure.decode(self._store.compare_set("first", "", mine.encode()))
        except Exception:
            return (self._heard or RANK_0_GONE) if wait_s else mine

    def keep_store_a_moment(self) -> None:
        """The store goes with rank 0: others are to learn from it why they end."""
        if self.rank == 0 and self._store is not None:
            time.sleep(2.0)

    # ---- the thread -------------------------------------------------------------------------------------------------
    def _run(self) -> None:
        beat, beat_every = 0, max(POLL_S, self.settings.silent_s / 6)
        next_beat = 0.0
        while self._heard is None and not self._ending.wait(POLL_S):
            try:
                if self._store is not None and self._store.check(["first"]):
                    self._heard = Failure.decode(self._store.get("first"))
                elif self._store is not None and time.monotonic() >= next_beat:
                    self._store.set(f"beat/{self.rank}", f"{beat} {socket.gethostname()}")
                    beat, next_beat = beat + 1, time.monotonic() + beat_every
                    if self.rank == 0:
                        self._miss_beats()
                self._round = time.monotonic()
                self._notice_hang()
            except Exception:
                self._heard = RANK_0_GONE
        if self._heard is None:
            return
        if self._heard.cause == "hang":
            self._say_where()
        elif self._ending.wait(self.grace_s):
            return
        self._end(self._heard)

    def _guard(self) -> None:
        """A store whose process is frozen lets a question wait for ever, whatever its time-out says."""
        while not self._ending.wait(POLL_S):
            if self._heard is None and time.monotonic() - self._round > self.settings.silent_s + 2 * POLL_S:
                self._end(RANK_0_GONE)

    def _miss_beats(self) -> None:
        """On rank 0: say which rank is silent."""
        now = time.monotonic()
        known = [r for r in range(self.world_size) if self._store.check([f"beat/{r}"])] if not self._all_begun else None
        ranks = range(self.world_size) if known is None else known
        for rank, beat in zip(ranks, self._store.multi_get([f"beat/{r}" for r in ranks])):
            last, since = self._beats.get(rank, (b"", now))
            if beat != last:
                self._beats[rank] = (beat, now)
            elif now - since > self.settings.silent_s:
                host = beat.decode().split(" ", 1)[1]
                text = f"rank {rank} on {host} is silent for {now - since:.0f} s (killed, frozen, or its node is gone)"
                self._heard = self.first(Failure(self.rank, "node", text), wait_s=0.0)
                return

    @property
    def _all_begun(self) -> bool:
        return len(self._beats) == self.world_size

    def _notice_hang(self) -> None:
        limit, progress = self.settings.hang_s, self._progress
        if limit is None or progress is None or (waited := time.monotonic() - progress) <= limit:
            return
        text = f"rank {self.rank} hangs: no progress for {waited:.0f} s in {self._doing}"
        self._heard = self.first(Failure(self.rank, "hang", text), wait_s=0.0)

    def _say_where(self) -> None:
        """Every rank leaves its stack; rank 0 says who waits for what."""
        where = main_thread_waits_for()
        if self.settings.stacks is not None:
            try:
                dump_stacks(self.settings.stacks / f"rank-{self.rank:05d}.stack.txt")
            except OSError as error:
                print(f"rank {self.rank}: no stack was left: {error}", file=sys.stderr, flush=True)
        if self._store is None:
            print(f"rank {self.rank} {where}", file=sys.stderr, flush=True)
            return
        try:
            self._store.set(f"where/{self.rank}", where)
            if self.rank == 0:
                self._print_where()
                self._store.set("told", "all")
            else:  # a rank that ends now would wake others from where they wait, before they have said where that is
                deadline = time.monotonic() + _COLLECT_S
                while time.monotonic() < deadline and not self._store.check(["told"]):
                    time.sleep(0.1)
        except Exception:
            print(f"rank {self.rank} {where}", file=sys.stderr, flush=True)

    def _print_where(self) -> None:
        deadline, ranks = time.monotonic() + _COLLECT_S, list(range(self.world_size))
        while time.monotonic() < deadline and not self._store.check([f"where/{r}" for r in ranks]):
            time.sleep(0.2)
        said: dict[str, list[int]] = {}
        for rank in ranks:
            known = self._store.check([f"where/{rank}"])
            words = self._store.get(f"where/{rank}").decode() if known else "says nothing"
            said.setdefault(words, []).append(rank)
        for words, those in sorted(said.items(), key=lambda pair: len(pair[1])):
            shown = ", ".join(map(str, those[:16])) + (f", ... ({len(those)} in all)" if len(those) > 16 else "")
            print(f"rank {shown} {words}", file=sys.stderr, flush=True)

    def _end(self, failure: Failure) -> None:
        try:
            self._tell_ending(failure)
        finally:
            self.keep_store_a_moment()
            os._exit(EXIT_FAILED)
