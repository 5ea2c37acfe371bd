"""One error told first, and every rank ended soon after: over the store the ranks met at, beside all groups.

A rank that raises says so. One that is killed, frozen or cut off falls silent: rank 0 misses its beat. One that hangs
makes no progress: it notices itself, from a thread.
"""

from __future__ import annotations

import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from configs.errors import EXIT_BAD_INPUT, EXIT_FAILED, Cause, RankFailed, UserError
from parallel import groups
from parallel.watch import RANK_0_GONE, Failure, Watch, WatchSettings

GRACE_S = 10.0  # that a rank has to end by itself once another has failed
_LOST_CONTACT = re.compile(
    r"connection (closed|reset|refused)|broken pipe|time(d )?out|socket|recvmsg|sendmsg|remote (process|error|peer)",
    re.IGNORECASE,
)
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory|not enough memory", re.IGNORECASE)


@dataclass(frozen=True)
class Ending:
    """Why this rank ends.

    Attributes:
        cause: None where it ends for another's.
    """

    cause: Cause | None
    detail: str  # one line


@contextmanager
def working_together(
    rank: int,
    world_size: int,
    settings: WatchSettings | None = None,
    report: Callable[[Ending], None] = lambda ending: None,
) -> Iterator[Watch]:
    """What ranks do after they have met. Leaves all groups at the end; if it fails on any rank, on all.

    Args:
        report: told why this rank ends, before it does, if it fails.

    Raises:
        RankFailed: with this rank's exit code; what it has to say is said.
    """

    def ended_by_watch(failure: Failure) -> None:
        mine = failure.rank == rank or failure == RANK_0_GONE  # which nobody else will say
        own = failure.rank == rank
        detail = failure.text if own else f"ends, as {failure.text}"
        report(Ending(failure.cause if mine else None, detail))
        print(detail if own else f"rank {rank} {detail}", file=sys.stderr, flush=True)

    watch = Watch(rank, world_size, settings or WatchSettings(), GRACE_S, ended_by_watch)
    try:
        yield watch
        groups.wait_for_all()  # still watched: a rank may fail on its last line
        watch.stop()
        groups.leave()
    except Exception as error:
        # No group is left in order: with a rank gone, that could wait for ever.
        report(_tell(watch, error))
        raise RankFailed(EXIT_BAD_INPUT if isinstance(error, UserError) else EXIT_FAILED) from error


def _tell(watch: Watch, error: BaseException) -> Ending:
    """Record this rank's failure and say it, if it is the first; else say why this rank ends."""
    watch.stop()
    mine = Failure(watch.rank, cause_of(error), f"rank {watch.rank}: {_one_line(error)}")
    lost_contact = _is_lost_contact(error)
    first = watch.first(mine, wait_s=3.0 if lost_contact else 0.0)
    if first == mine:
        told = _told_first(watch.rank, error, lost_contact)
    elif isinstance(error, UserError) and first.text.endswith(_one_line(error)):
        told = ""  # every rank met the same; one tells it
    else:
        time.sleep(1.0)  # the first is to be read first
        told = f"rank {watch.rank} ends, as {first.text}"
    if told:
        # A launcher that was killed takes its pipes with it; the status file is still to be written.
        with suppress(OSError):
            print(told, file=sys.stderr, flush=True)
    watch.keep_store_a_moment()
    if first == mine:
        return Ending(mine.cause, mine.text)
    return Ending(first.cause if first == RANK_0_GONE else None, f"ends, as {first.text}")


def cause_of(error: BaseException) -> Cause:
    """What kind of failure an error is."""
    if isinstance(error, UserError):
        return error.cause
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or _NO_MEMORY.search(str(error)):
        return "out_of_memory"
    if isinstance(error, KeyboardInterrupt | SystemExit):
        return "interrupted"
    if isinstance(error, OSError) and not isinstance(error, ConnectionError | TimeoutError):
        return "disk"
    return "node" if _is_lost_contact(error) else "unknown"


def _told_first(rank: int, error: BaseException, lost_contact: bool) -> str:
    if isinstance(error, UserError):
        return f"\n{error}\n"
    if lost_contact:
        return (
            f"rank {rank} lost contact with another rank, which ended without a word (killed? out of "
            f"memory?) or hangs\n  {_one_line(error)}\n  {_where(error)}"
        )
    told = "".join(traceback.format_exception(error)).rstrip()
    return f"rank {rank} failed, and ends the run:\n{told}"


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
