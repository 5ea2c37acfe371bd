"""How long from the command to the first training step, and where the time goes; floors: the imports alone.

The run itself writes the parts of its start into metrics.jsonl; what no part accounts for is the launcher, the
interpreter and its imports.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import report
from configs.corpus import CorpusConfig
from data_prep.pipeline import prepare

CHECKOUT = Path(__file__).resolve().parent.parent
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
VOCABULARY = 512


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
        tokens = _tiny_corpus(folder)
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
    for launch, runs in starts.items():
        medians = {part: statistics.median(run[part] for run in runs) for part in runs[0]}
        total = medians["command to first step"]
        for part, value in medians.items():
            row: dict[str, report.Figure] = {"case": launch, "candidate": part, "seconds": value}
            row["share"] = value / total
            if part == "command to first step":
                row["ratio"] = total / floor
            rows.append(row)
    return rows


def _start(launch: str, tokens: Path, run_dir: Path) -> dict[str, float]:
    """Seconds of each part of one run of one step."""
    ranks = 2 if launch.startswith("deepspeed") else 1
    command = [sys.executable, "pretrain/main.py"]
    if ranks > 1:
        launcher = shutil.which("deepspeed", path=str(Path(sys.executable).parent)) or "deepspeed"
        command = [launcher, "--num_accelerators", str(ranks), "--master_port", str(_free_port()), "pretrain/main.py"]
    overrides = {
        "run_dir": run_dir,
        "model.vocab_size": VOCABULARY,
        "parallel.expert": ranks,
        "data.sources": f"[{{name: tiny, path: {tokens}}}]",
        "data.heldout": "[]",
        "train.steps": 1,
        "train.batch_tokens": 256 * ranks,
        "train.micro_batch_sequences": 1,
        "train.schedule.warmup_steps": 0,
        "train.log_every_steps": 1,
    }
    command += ["--config", "configs/demo.yaml", *(f"{key}={value}" for key, value in overrides.items())]
    began = time.time()
    done = subprocess.run(command, cwd=CHECKOUT, env=_environment(), capture_output=True, text=True, timeout=300)
    ended = time.time()
    records = [json.loads(line) for line in _lines(run_dir / "metrics.jsonl")]
    started = next((r for r in records if r.get("event") == "started"), None)
    first = next((r for r in records if r["kind"] == "train"), None)
    if done.returncode or started is None or first is None:
        raise RuntimeError(
            f"{' '.join(command)}: exit code {done.returncode}: {done.stdout[-800:]}{done.stderr[-800:]}"
        )
    # A later version of the run may name more parts; all count.
    parts = {part: float(started["seconds"].get(part, 0.0)) for part in dict.fromkeys((*PARTS, *started["seconds"]))}
    before = started["time"] - began - sum(parts.values())
    return {
        "command to first step": first["time"] - began,
        "launcher and imports": max(0.0, before),
        **parts,
        "first step": first["time"] - started["time"],
        "checkpoint and end": ended - first["time"],
    }


def _import_seconds(statement: str) -> float:
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", statement],
        cwd=CHECKOUT,
        env=_environment(),
        capture_output=True,
        check=True,
        timeout=300,
    )
    return time.perf_counter() - began


def _environment() -> dict[str, str]:
    """This process's environment, less what a launcher left in it: a child would take it for its own rank."""
    left = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {key: value for key, value in os.environ.items() if key not in left}
    # The launcher starts `python3`, which must be this one.
    kept["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), kept.get("PATH", "")))
    return kept


def _tiny_corpus(folder: Path) -> Path:
    """A few hundred KB of this checkout's own sources, tokenized; returns the folder of token shards."""
    config = CorpusConfig.check(
        {
            "output": str(folder / "corpus"),
            "sources": [{"kind": "text_tree", "name": "tiny", "path": str(CHECKOUT / "model"), "pattern": "**/*.py"}],
            "tokenizer": {"kind": "train_sentencepiece", "vocab_size": VOCABULARY, "sample_bytes": 200_000},
            "heldout_fraction": 0.0,
            "workers": 1,
        },
        where="benchmarks/startup.py",
    )
    prepare(config)
    return folder / "corpus" / "train" / "tiny"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main())
