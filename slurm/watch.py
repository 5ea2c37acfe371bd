"""Beside a step: the ranks have ended, srun has not. `python -m slurm.watch RUN --after N ...`.

When a slurmstepd is killed nobody notices, and srun waits for ever. This program ends with exit code 0 and a line of
why once that is so, and with 1 once srun is gone. The batch script then ends the step.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from slurm.run_folder import FAILED, RUNNING, RankStatus, read_ranks
from slurm.verdict import read_options

# Some ranks have left well and others not yet: they may still write the last checkpoint.
PATIENCE_WITH_SAVES = 10


def patience(
    ranks: Sequence[RankStatus], num_ranks: int, kill_wait_s: float, is_gone: Callable[[RankStatus], bool]
) -> tuple[float, str] | None:
    """How long srun may go on once the ranks say this, and what they say; None while all is well."""
    gone = [rank for rank in ranks if rank.state == RUNNING and is_gone(rank)]
    ended = [rank for rank in ranks if rank.state != RUNNING]
    if len(ended) + len(gone) >= num_ranks:
        return kill_wait_s, f"all {num_ranks} rank(s) have ended"
    if failed := [rank for rank in ended if rank.state == FAILED]:
        return kill_wait_s, f"rank {failed[0].rank} has failed"
    if gone:
        return kill_wait_s, f"rank {gone[0].rank}, process {gone[0].pid}, is gone without a word"
    if ended:
        return kill_wait_s * PATIENCE_WITH_SAVES, f"{len(ended)} of {num_ranks} rank(s) have ended"
    return None


def gone_from_here(rank: RankStatus) -> bool:
    """A process of this machine that is no more. Of other machines nothing is known."""
    return rank.host == socket.gethostname() and bool(rank.pid) and not _lives(rank.pid)


def _lives(pid: int | None) -> bool:
    try:
        os.kill(pid or 0, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        return True
    return True


def watch(run_dir: Path, options: Mapping[str, str]) -> str | None:
    """Return why the step is to be ended, once it is; None once srun has ended by itself."""
    num_ranks, kill_wait_s = int(options["ranks"]), float(options["kill-wait"])
    look_here = options.get("processes") == "visible"
    after, launched = int(options["after"]), float(options["since"])
    seen: float | None = None
    # A thousand small files are read in a second or so; their server has better to do.
    poll_s = max(min(5.0, kill_wait_s / 4), num_ranks / 100)
    while _lives(int(options["beside"])):
        ranks = read_ranks(run_dir, after, launched)
        found = patience(ranks, num_ranks, kill_wait_s, gone_from_here if look_here else lambda rank: False)
        if found is None:
            seen = None
        else:
            seen = time.monotonic() if seen is None else seen
            if time.monotonic() - seen >= found[0]:
                return f"{found[1]}, and for {found[0]:.0f} s srun has not returned"
        time.sleep(poll_s)
    return None


def main(arguments: Sequence[str]) -> int:
    why = watch(Path(arguments[0]), read_options(arguments[1:]))
    if why is None:
        return 1
    print(why, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
