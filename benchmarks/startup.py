"""How long from the command to the first training step, and where the time goes; floors: the imports alone.

The run itself writes the parts of its start into metrics.jsonl; what no part accounts for is the launcher, the
interpreter and its imports.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.launch import CHECKOUT, environment, launch, tiny_corpus

PARTS = ("data", "process groups", "model", "engine", "checkpoint", "metrics")
COLUMNS = {
    "case": "case",
    "candidate": "candidate",
    "seconds": "seconds",
    "ratio": "x the floor",
    "share": "share of the start",
}
FLOORS = {
    "import torch": "import torch",
    "import deepspeed": "import deepspeed",
    "import the trainer": "import pretrain.loop, pretrain.build",
}
LAUNCHES = ("plain python", "deepspeed, 2 ranks")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = report.make_parser("startup", (__doc__ or "").split("\n\n")[0], "python -m benchmarks.startup --rounds 3")
    parser.add_argument("--launches", nargs="+", choices=LAUNCHES, help="(default: both)")
    parsed = parser.parse_args(arguments)
    device = report.set_up(parsed)
    size = report.size_of(parsed)
    rounds = report.rounds_for(parsed, {"full": 3, "quick": 1, "smoke": 1})
    launches = report.chosen(parsed.launches, LAUNCHES[:1] if size == "smoke" else LAUNCHES)
    result = report.Report("startup", size, report.machine_facts(device, parsed) | {"clock": "wall time"})
    floors: dict[str, list[float]] = {name: [] for name in FLOORS}
    starts: dict[str, list[dict[str, float]]] = {name: [] for name in launches}
    with report.output_kept_clean(), tempfile.TemporaryDirectory(prefix="startup") as scratch:
        folder = Path(scratch)
        tokens = tiny_corpus(folder)
        if size != "smoke":
            _import_seconds("import torch, deepspeed")  # untimed: from here on the files are in the page cache
        for number in range(rounds):
            for name, statement in FLOORS.items():
                floors[name].append(_import_seconds(statement))
            for name in launches:
                starts[name].append(_start(name, tokens, folder / f"run_{number}_{len(name)}"))
    result.rows.extend(_rows(floors, starts))
    result.notes.append(
        "plain python and deepspeed: pretrain/main.py --config configs/demo.yaml on a tiny corpus, one step of one "
        f"sequence a rank. Medians of {rounds} round(s). "
        "x the floor: of importing deepspeed alone, in a process of its own."
    )
    result.print(parsed.json, COLUMNS)
    return 0


def _rows(
    floors: Mapping[str, list[float]], starts: Mapping[str, list[dict[str, float]]]
) -> list[dict[str, report.Figure]]:
    floor = statistics.median(floors["import deepspeed"])
    rows: list[dict[str, report.Figure]] = []
    for name, seconds in floors.items():
        median = statistics.median(seconds)
        rows.append({"case": "floor", "candidate": name, "seconds": median, "ratio": median / floor})
    for door, runs in starts.items():
        medians = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
        total = medians["command to first step"]
        for part, value in medians.items():
            row: dict[str, report.Figure] = {"case": door, "candidate": part, "seconds": value}
            row["share"] = value / total
            if part == "command to first step":
                row["ratio"] = total / floor
            rows.append(row)
    return rows


def _start(candidate: str, tokens: Path, run_dir: Path) -> dict[str, float]:
    """Seconds of each part of one run of one step."""
    ranks = 2 if candidate.startswith("deepspeed") else 1
    overrides = {
        "parallel.expert": ranks,
        "train.steps": 1,
        "train.batch_tokens": 256 * ranks,
        "train.micro_batch_sequences": 1,
    }
    run = launch(ranks, run_dir, tokens, overrides)
    # A later version of the run may name more parts; all count.
    told = run.started["seconds"]
    parts = {part: float(told.get(part, 0.0)) for part in dict.fromkeys((*PARTS, *told))}
    return {
        "command to first step": run.steps[0]["time"] - run.began,
        "launcher and imports": max(0.0, run.started["time"] - run.began - sum(parts.values())),
        **parts,
        "first step": run.steps[0]["time"] - run.started["time"],
        "checkpoint and end": run.ended - run.steps[0]["time"],
    }


def _import_seconds(statement: str) -> float:
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", statement],
        cwd=CHECKOUT,
        env=environment(),
        capture_output=True,
        check=True,
        timeout=300,
    )
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
