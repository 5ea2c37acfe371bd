"""Runs of the real trainer through its launcher, on a tiny corpus, for benchmarks of whole processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.corpus import CorpusConfig
from data_prep.pipeline import prepare
from slurm.environ import free_port

CHECKOUT = Path(__file__).resolve().parent.parent
VOCABULARY = 512


@dataclass(frozen=True)
class Launched:
    """What one run left."""

    began: float  # seconds since the epoch
    ended: float
    started: dict[str, Any]  # its record of its start
    steps: list[dict[str, Any]]  # its record of each logged step
    peak_bytes: list[int]  # largest resident memory of each rank; empty where it was not watched


def launch(ranks: int, run_dir: Path, tokens: Path, overrides: Mapping[str, object], watch: bool = False) -> Launched:
    """Run configs/demo.yaml on `tokens`, under `deepspeed` where there is more than one rank, to its end.

    Args:
        watch: look at the ranks' memory ten times a second (Linux).

    Raises:
        RuntimeError: it failed; carries the end of what it said.
    """
    command = [sys.executable, "pretrain/main.py"]
    if ranks > 1:
        launcher = shutil.which("deepspeed", path=str(Path(sys.executable).parent)) or "deepspeed"
        command = [launcher, "--num_accelerators", str(ranks), "--master_port", str(free_port()), "pretrain/main.py"]
    every = {
        "run_dir": run_dir,
        "model.vocab_size": VOCABULARY,
        "data.sources": f"[{{name: tiny, path: {tokens}}}]",
        "data.heldout": "[]",
        "train.schedule.warmup_steps": 0,
        "train.log_every_steps": 1,
        **overrides,
    }
    command += ["--config", "configs/demo.yaml", *(f"{key}={value}" for key, value in every.items())]
    said, peaks = run_dir.with_suffix(".log"), dict[int, int]()
    began = time.time()
    with said.open("w") as log:
        process = subprocess.Popen(command, cwd=CHECKOUT, env=environment(), stdout=log, stderr=log)
        while process.poll() is None:
            if watch:
                peaks |= _peaks(f"run_dir={run_dir}")
            time.sleep(0.1)
            if time.time() - began > 600:
                process.kill()
    ended = time.time()
    records = [json.loads(line) for line in _lines(run_dir / "metrics.jsonl")]
    started = next((r for r in records if r.get("event") == "started"), None)
    steps = [r for r in records if r["kind"] == "train"]
    if process.returncode or started is None or not steps:
        raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}: {said.read_text()[-1500:]}")
    return Launched(began, ended, started, steps, sorted(peaks.values())[-ranks:] if watch else [])


def _peaks(mark: str) -> dict[int, int]:
    """Process -> largest resident memory so far, of the trainer's processes that have `mark` among their arguments."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (path / "cmdline").read_bytes().decode().split("\0")
            launchers = any("deepspeed" in argument for argument in arguments)  # they carry the same arguments
            if mark in arguments and not launchers:
                status = dict(line.split(":", 1) for line in (path / "status").read_text().splitlines() if ":" in line)
                found[int(path.name)] = int(status["VmHWM"].split()[0]) * 1024
        except (OSError, KeyError, UnicodeDecodeError):  # gone meanwhile
            continue
    return found


def environment() -> dict[str, str]:
    """This process's environment, less what a launcher left in it: a child would take it for its own rank."""
    left = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    kept = {key: value for key, value in os.environ.items() if key not in left}
    # The launcher starts `python3`, which must be this one.
    kept["PATH"] = os.pathsep.join((str(Path(sys.executable).parent), kept.get("PATH", "")))
    return kept


def tiny_corpus(folder: Path) -> Path:
    """A few hundred KB of this checkout's own sources, tokenized; returns the folder of token shards."""
    config = CorpusConfig.check(
        {
            "output": str(folder / "corpus"),
            "sources": [{"kind": "text_tree", "name": "tiny", "path": str(CHECKOUT / "model"), "pattern": "**/*.py"}],
            "tokenizer": {"kind": "train_sentencepiece", "vocab_size": VOCABULARY, "sample_bytes": 200_000},
            "heldout_fraction": 0.0,
            "workers": 1,
        },
        where="benchmarks/launch.py",
    )
    prepare(config)
    return folder / "corpus" / "train" / "tiny"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []
