"""Does block-sparse attention learn as well as full attention: twins on the demo corpus at 4K tokens, which differ in
nothing but what a row may see, and their held-out loss, in total and by quarter of the positions.

Same model, seed, batches and steps; trained by the trainer itself, on one process. Runs that are done are not repeated:
they lie in runs/attention_learning. Needs the demo's data, and prepares it where it is not there.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import yaml

from benchmarks import report
from benchmarks.timing import pick_device

MODULE = "benchmarks.attention_learning"
ROOT = Path(__file__).resolve().parent.parent
FULL = "full"
COLUMNS = {
    "case": "case",
    "candidate": "attention",
    "loss_shown": "nats a token",
    "difference": "less full's",
    "quarters": "by quarter",
    "last_difference": "less full's in the last",
    "seconds": "s of training",
}
# name -> overrides on top of the common ones
VARIANTS = {
    FULL: (),
    "bigbird": ("model.attention.sparse={layout: {kind: bigbird, sinks: 1, window: 3, random: 3}}",),
    "bigbird, every 4th full": (
        "model.attention.sparse={pattern: SSSF, layout: {kind: bigbird, sinks: 1, window: 3, random: 3}}",
    ),
    "window": ("model.attention.sparse={layout: {kind: window, window: 7}}",),
    "etc": (
        "model.attention.sparse={layout: {kind: etc, sinks: 1, window: 4, segment_tokens: 256, summary_tokens: 8}}",
    ),
}
# size -> steps, tokens a sequence, sequences a step, held-out sequences, layers, width
SIZES = {"full": (240, 4096, 1, 64, 4, 256), "quick": (12, 2048, 1, 4, 2, 64), "smoke": (3, 512, 1, 2, 2, 32)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = report.make_parser(
        "attention_learning", (__doc__ or "").split("\n\n")[0], f"python -m {MODULE} --seeds 0 1"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, help="updates of each run (default: 240)")
    parser.add_argument("--sequences", type=int, help="sequences of a step (default: 1)")
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=[FULL, "bigbird"], help="(default: full bigbird)"
    )
    parser.add_argument("--precision", choices=["float32", "bf16"], help="(default: float32; bf16 on a GPU)")
    parser.add_argument("--kernel", default="auto", help="of the sparse runs: they differ by rounding (default: auto)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, for a GPU that one does not fill")
    parser.add_argument("--data", default="data/demo", help="the folder `glam prep configs/corpus_demo.yaml` makes")
    parser.add_argument("--runs", default=str(ROOT / "runs/attention_learning"), help="where the runs are kept")
    parsed = parser.parse_args(arguments)
    device = report.set_up(parsed)
    result = report.Report("attention_learning", report.size_of(parsed), report.machine_facts(device, parsed))
    with report.output_kept_clean():
        _prepare(Path(parsed.data))
        names = list(dict.fromkeys((FULL, *parsed.variants)))
        with ThreadPoolExecutor(parsed.jobs) as pool:
            made = pool.map(lambda one: _row(*one, parsed), product(names, parsed.seeds))
            found = dict(zip(product(names, parsed.seeds), made))
        for seed in parsed.seeds:
            rows = {name: found[name, seed] for name in names}
            for row in rows.values():
                row["difference"] = _less(row, rows[FULL], "loss")
                row["last_difference"] = _less(row, rows[FULL], "last_quarter")
            result.rows.extend(rows.values())
    result.notes.extend(_notes(result.rows, parsed))
    result.print(parsed.json, COLUMNS)
    return 0


def _less(row: dict[str, report.Figure], full: dict[str, report.Figure], key: str) -> float:
    return round(float(row[key] or 0) - float(full[key] or 0), 4)


def _prepare(data: Path) -> None:
    if not (data / "data.yaml").exists():
        _run("pretrain.cli", "prep", "configs/corpus_demo.yaml", f"output={data}")


def _row(name: str, seed: int, parsed: argparse.Namespace) -> dict[str, report.Figure]:
    """One run, trained if it is not done yet, and evaluated."""
    steps, length, sequences, heldout, layers, width = SIZES[report.size_of(parsed)]
    steps, sequences = parsed.steps or steps, parsed.sequences or sequences
    data = yaml.safe_load((Path(parsed.data) / "data.yaml").read_text(encoding="utf-8"))["data"] | {"seed": seed}
    on_gpu = pick_device().type == "cuda"
    precision, micro_batch = parsed.precision or ("bf16" if on_gpu else "float32"), sequences if on_gpu else 1
    overrides = (
        f"model.num_layers={layers}", f"model.width={width}",
        "model.attention.position={kind: rotary}", *VARIANTS[name],
        *((f"model.attention.sparse.kernel={parsed.kernel}",) if VARIANTS[name] else ()),
        f"data={json.dumps(data)}", f"train.seed={seed}",
        f"train.steps={steps}", f"train.sequence_length={length}", f"train.batch_tokens={length * sequences}",
        f"train.micro_batch_sequences={micro_batch}", f"train.eval_sequences={heldout}",
        f"train.eval_every_steps={steps}", f"train.save_every_steps={steps}",
        f"train.schedule.warmup_steps={min(40, steps // 3)}",
        f"train.precision={precision}", "train.recompute=false", "parallel.expert=1", "cluster.preflight=off",
    )  # fmt: skip
    settings = hashlib.sha256(repr(overrides).encode()).hexdigest()[:8]
    run_dir = Path(parsed.runs).absolute() / f"{name.replace(', ', '_').replace(' ', '_')}-{seed}-{settings}"
    started = time.perf_counter()
    fresh = not (run_dir / "DONE").exists()
    if fresh:
        _run("pretrain.main", "--config", "configs/demo.yaml", f"run_dir={run_dir}", *overrides)
    seconds = time.perf_counter() - started
    found = json.loads(_run("pretrain.cli", "eval", str(run_dir), "--json").splitlines()[-1])
    quarters = found["loss_by_quarter"]
    row: dict[str, report.Figure] = {
        "case": f"seed {seed}", "candidate": name, "loss": found["loss"], "loss_shown": f"{found['loss']:.4f}",
        "last_quarter": quarters[-1], "quarters": " ".join(f"{loss:.4f}" for loss in quarters),
        "tokens_seen": steps * length * sequences,
    }  # fmt: skip
    return row | ({"seconds": round(seconds, 1)} if fresh else {})


def _run(module: str, *arguments: str) -> str:
    """Raises: RuntimeError: it failed; carries the end of what it said."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        environment = os.environ | {"MASTER_PORT": str(free.getsockname()[1])}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{module}: exit code {done.returncode}: {(done.stderr + done.stdout)[-1500:]}")
    return done.stdout


def _notes(rows: list[dict[str, report.Figure]], parsed: argparse.Namespace) -> list[str]:
    steps, length, sequences, heldout, layers, width = SIZES[report.size_of(parsed)]
    notes = [
        f"{layers} layers of width {width}, rotary positions, {length} tokens a sequence, "
        f"{(parsed.steps or steps) * (parsed.sequences or sequences) * length:,} tokens seen, "
        f"{heldout * length:,} held out. Quarters: of the positions in a sequence."
    ]
    for name in (name for name in dict.fromkeys(str(row["candidate"]) for row in rows) if name != FULL):
        differences = [float(row["difference"] or 0) for row in rows if row["candidate"] == name]
        last = [float(row["last_difference"] or 0) for row in rows if row["candidate"] == name]
        notes.append(
            f"{name}: {statistics.mean(differences):+.4f} nats to full attention, {statistics.mean(last):+.4f} in the "
            f"last quarter (mean of {len(differences)} seeds)"
        )
    return notes


if __name__ == "__main__":
    sys.exit(main())
