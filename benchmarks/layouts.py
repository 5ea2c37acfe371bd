"""What each layout costs on this machine: seconds from the command to the first step, memory of a rank, tokens/s.

On a laptop eight ranks share a few cores, so tokens/s say what spreading costs there, not what it wins on a cluster.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.launch import launch, tiny_corpus

COLUMNS = {
    "case": "ranks",
    "candidate": "layout",
    "seconds": "s to first step",
    "tokens_per_s": "tokens/s",
    "ratio": "x data parallel",
    "peak_mb": "peak MB a rank",
}
SEQUENCES = 32  # a step, of 256 tokens
LAYOUTS = {  # parallel section -> ranks
    "{data: 1}": 1,
    "{data: 2}": 2,
    "{data: 2, expert: 2}": 2,
    "{tensor: 2, expert: 2}": 2,
    "{pipeline: 2}": 2,
    "{data: 8}": 8,
    "{data: 8, zero_stage: 0}": 8,
    "{data: 8, expert: 8}": 8,
    "{tensor: 2, data: 4}": 8,
    "{pipeline: 2, data: 4}": 8,
    "{pipeline: 2, data: 4, schedule: dualpipev}": 8,
    "{pipeline: 4, data: 2}": 8,
    "{tensor: 2, pipeline: 2, expert: 2, data: 2}": 8,
    "{tensor: 2, pipeline: 2, expert: 2, data: 2, sequence: false}": 8,
    "{tensor: 2, pipeline: 2, expert: 2, data: 2, expert_tensor: true}": 8,
}
QUICK = ("{data: 2}", "{tensor: 2, expert: 2}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = report.make_parser("layouts", (__doc__ or "").split("\n\n")[0], "python -m benchmarks.layouts --threads 1")
    parser.add_argument("--layouts", nargs="+", choices=list(LAYOUTS), help="(default: all)")
    parsed = parser.parse_args(arguments)
    device = report.set_up(parsed)
    size = report.size_of(parsed)
    listed = {"full": tuple(LAYOUTS), "quick": QUICK, "smoke": QUICK[:1]}[size]
    chosen = report.chosen(parsed.layouts, listed)
    steps = {"full": 8, "quick": 5, "smoke": 2}[size]
    result = report.Report("layouts", size, report.machine_facts(device, parsed) | {"clock": "wall time"})
    with report.output_kept_clean(), tempfile.TemporaryDirectory(prefix="layouts") as scratch:
        tokens = tiny_corpus(Path(scratch))
        for number, layout in enumerate(chosen):
            result.rows.append(_measure(layout, Path(scratch) / f"run_{number}", tokens, steps))
    base = {row["case"]: row["tokens_per_s"] for row in reversed(result.rows) if "data" in str(row["candidate"])}
    for row in result.rows:
        if isinstance(reference := base.get(row["case"]), float) and isinstance(row["tokens_per_s"], float):
            row["ratio"] = row["tokens_per_s"] / reference
    result.notes.append(
        f"configs/demo.yaml's model on a tiny vocabulary, float32; {SEQUENCES * 256} tokens a step in 4 micro-batches "
        f"a data rank; tokens/s: median of {steps - 1} steps after the first. peak MB: the fullest rank's resident "
        "memory, libraries that ranks share included. x data parallel: of the first listed layout of as many ranks."
    )
    result.print(parsed.json, COLUMNS)
    return 0


def _measure(layout: str, run_dir: Path, tokens: Path, steps: int) -> dict[str, report.Figure]:
    ranks = LAYOUTS[layout]
    data = next((int(part.split(":")[1]) for part in layout.strip("{}").split(",") if "data" in part), 1)
    overrides = {
        "parallel": layout,
        "train.steps": steps,
        "train.batch_tokens": SEQUENCES * 256,
        "train.micro_batch_sequences": SEQUENCES // (data * 4),
    }
    run = launch(ranks, run_dir, tokens, overrides, watch=True)
    later = [step["tokens_per_s"] for step in run.steps[1:]]
    return {
        "case": f"{ranks}",
        "candidate": layout,
        "seconds": run.steps[0]["time"] - run.began,
        "tokens_per_s": statistics.median(later),
        "peak_mb": report.megabytes(max(run.peak_bytes, default=0)),
    }


if __name__ == "__main__":
    sys.exit(main())
