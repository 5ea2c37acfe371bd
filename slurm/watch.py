"""Beside a step: ranks have ended or fallen silent, srun has not. `python -m slurm.watch RUN --after N ...`.

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
# A node counts as silent after so many times kill_wait_s, and no sooner than after six beats (pretrain/status.py).
SILENT_WAITS, LEAST_SILENT_S = 3, 30.0


def patience(
    ranks: Sequence[RankStatus], num_ranks: int, kill_wait_s: float, why_gone: Callable[[RankStatus], str | None]
) -> tuple[float, str] | None:
    """How long srun may go on once the ranks say this, and what they say; None while all is well."""
    gone = [(rank, why) for rank in ranks if rank.state == RUNNING and (why := why_gone(rank))]
    ended = [rank for rank in ranks if rank.state != RUNNING]
    if failed := [rank for rank in ended if rank.state == FAILED]:
        return kill_wait_s, f"rank {failed[0].rank} has failed"
    if gone:
        rank, why = gone[0]
        more = f", as are {len(gone) - 1} more" if len(gone) > 1 else ""
        return kill_wait_s, f"rank {rank.rank}, process {rank.pid} on {rank.host}, {why}{more}"
    if len(ended) >= num_ranks:
        return kill_wait_s, f"all {num_ranks} rank(s) have ended"
    if ended:
        return kill_wait_s * PATIENCE_WITH_SAVES, f"{len(ended)} of {num_ranks} rank(s) have ended"
    return None


def gone_from_here(rank: RankStatus) -> bool:
    """A process of this machine that is no more. Of other machines nothing is known."""
    return rank.host == socket.gethostname() and bool(rank.pid) and not _lives(rank.pid)


class Beats:
    """Nodes of which nothing is heard. What counts is that a file's time changes; no two clocks are compared."""

    def __init__(self, silent_s: float) -> None:
        self._silent_s = silent_s
        self._quiet: dict[int, tuple[int, float]] = {}  # rank -> its last beat, and for how long it is the last

    def silent_nodes(self, ranks: Sequence[RankStatus], passed_s: float) -> dict[str, float]:
        """
        Args:
            ranks: as read now.
            passed_s: since the call before, as far as ranks could have been heard.

        Returns:
            Nodes none of whose ranks has been heard of for too long, and for how long.
        """
        nodes: dict[str, float] = {}
        for rank in ranks:
            beat, quiet_s = self._quiet.get(rank.rank, (0, 0.0))
            quiet_s = quiet_s + passed_s if beat == rank.beat else 0.0
            self._quiet[rank.rank] = rank.beat, quiet_s
            if rank.state == RUNNING:
                nodes[rank.host] = min(quiet_s, nodes.get(rank.host, quiet_s))
        # Where nobody is heard, it is the disk that stands still.
        if min(nodes.values(), default=0.0) > self._silent_s / 2:
            return {}
        return {host: quiet_s for host, quiet_s in nodes.items() if quiet_s >= self._silent_s}


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
    beats = Beats(max(LEAST_SILENT_S, SILENT_WAITS * kill_wait_s))
    since: float | None = None
    # A thousand small files are read in a second or so; their server has better to do.
    poll_s = max(min(5.0, kill_wait_s / 4), num_ranks / 100)
    looked = time.monotonic()
    while _lives(int(options["beside"])):
        ranks, now = read_ranks(run_dir, after, launched), time.monotonic()
        # A job that SLURM has suspended stands still as a whole, this process included.
        silent = beats.silent_nodes(ranks, min(now - looked, 2 * poll_s))
        looked = now

        def why_gone(rank: RankStatus, silent: Mapping[str, float] = silent) -> str | None:
            if look_here and gone_from_here(rank):
                return "is gone without a word"
            return f"is silent for {silent[rank.host]:.0f} s" if rank.host in silent else None

        found = patience(ranks, num_ranks, kill_wait_s, why_gone)
        if found is None:
            since = None
        else:
            since = now if since is None else since
            if now - since >= found[0]:
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
