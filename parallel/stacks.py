"""Where a process is: the stack of all its threads in a file, and in one line what its main thread waits for."""

from __future__ import annotations

import faulthandler
import sys
import threading
from pathlib import Path
from types import FrameType

import torch.distributed as dist

_COLLECTIVES_FILE = "torch/distributed/distributed_c10d.py"


def main_thread_waits_for() -> str:
    """In one line: the collective and its ranks, or the innermost line of the project that runs."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    outermost: FrameType | None = None
    own: FrameType | None = None
    innermost = frame
    while frame is not None:
        if frame.f_code.co_filename.endswith(_COLLECTIVES_FILE):
            outermost = frame  # the call that was made; those inside it are its own
        elif own is None and "site-packages" not in frame.f_code.co_filename:
            own = frame
        frame = frame.f_back
    at = own or innermost
    where = f"{at.f_code.co_name}, {_short(at.f_code.co_filename)}:{at.f_lineno}" if at else "nowhere"
    if outermost is None:
        return f"is in {where}"
    return f"waits in {outermost.f_code.co_name} over {_ranks_of(outermost)}, called by {where}"


def dump_stacks(path: Path) -> None:
    """The stack of every thread, in words."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        faulthandler.dump_traceback(file, all_threads=True)


def _ranks_of(frame: FrameType) -> str:
    group = frame.f_locals.get("group")
    try:
        ranks = dist.get_process_group_ranks(group) if group is not None else list(range(dist.get_world_size()))
    except (ValueError, RuntimeError, KeyError, TypeError):
        return "a group that is gone"
    return f"ranks {ranks}" if len(ranks) <= 16 else f"{len(ranks)} ranks from {ranks[0]} to {ranks[-1]}"


def _short(path: str) -> str:
    return "/".join(Path(path).parts[-2:])
