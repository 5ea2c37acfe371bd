"""What a checkpoint costs: bandwidth of save, verify and load against the bare disk; how long training stands still.

Bandwidth: ranks write and read the same bytes by bare system calls (as dd does: 16 MiB at a time, then fsync), by our
store and by torch.distributed.checkpoint, in turns. Files leave the page cache before they are read. Beside training: a
real engine saves in both ways. `python -m benchmarks.checkpoint_scale` works out a thousand ranks.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence

from benchmarks import report
from pretrain.local_ranks import run_ranks

COLUMNS = {
    "case": "case",
    "candidate": "candidate",
    "seconds": "s",
    "mb_per_s": "MB/s",
    "ratio": "x bare disk",
    "stall_s": "stall s",
    "stall_ratio": "stall / synchronous",
    "peak_mb": "extra memory MB",
    "note": "note",
}
# (ranks, MiB a rank)
CASES = {"full": ((1, 512), (1, 2048), (2, 512), (4, 256)), "quick": ((1, 256), (2, 128)), "smoke": ((2, 4),)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = report.make_parser(
        "checkpoint", (__doc__ or "").split("\n\n")[0], "python -m benchmarks.checkpoint --quick"
    )
    parser.add_argument("--folder", help="on the disk to measure (default: the system's temporary folder)")
    parsed = parser.parse_args(arguments)
    device, size = report.set_up(parsed), report.size_of(parsed)
    result = report.Report("checkpoint", size, report.machine_facts(device, parsed) | {"clock": "wall time"})
    rounds = report.rounds_for(parsed, {"full": 7, "quick": 5, "smoke": 1})
    with report.output_kept_clean():
        from benchmarks.checkpoint_ranks import bandwidth_job, beside_job  # deepspeed prints as it is imported
    with report.output_kept_clean(), tempfile.TemporaryDirectory(prefix="checkpoint", dir=parsed.folder) as scratch:
        for ranks, mib in CASES[size]:
            found = run_ranks(ranks, bandwidth_job, str(scratch), mib * 2**20, rounds, timeout_s=1200)
            result.rows.extend(_bandwidth_rows(f"{ranks} rank(s) x {mib} MiB", found, ranks * mib * 2**20))
        for width in {"full": (256, 512), "quick": (256,), "smoke": (32,)}[size]:
            [rows] = run_ranks(1, beside_job, str(scratch), width, {"full": 5}.get(size, 2), timeout_s=1200)
            result.rows.extend(rows)
    result.notes.append(
        "x bare disk: median over rounds of the bare disk's seconds / the candidate's, paired. stall: seconds training "
        "stood still for a save that runs beside it; extra memory: resident, at its fullest, beyond that before it. "
        "slowed: by how much the steps meanwhile took longer, in seconds, the stall included."
    )
    result.print(parsed.json, COLUMNS)
    return 0


def _bandwidth_rows(case: str, found: list[dict[str, list[float]]], total: int) -> list[dict[str, report.Figure]]:
    rows: list[dict[str, report.Figure]] = []
    for name in found[0]:
        mine = [max(rank[name][n] for rank in found) for n in range(len(found[0][name]))]
        base_name = f"{name.split(':')[0]}: bare disk"
        base = [max(rank[base_name][n] for rank in found) for n in range(len(mine))]
        seconds = statistics.median(mine)
        ratio = statistics.median(b / m for b, m in zip(base, mine))
        rows.append(
            {"case": case, "candidate": name, "seconds": seconds, "mb_per_s": total / seconds / 1e6, "ratio": ratio}
        )
    return rows


if __name__ == "__main__":
    sys.exit(main())
