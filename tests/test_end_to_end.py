"""The front door, as a user takes it: text -> shards -> `deepspeed pretrain/main.py` -> resume -> evaluate -> generate.

Real launchers, real gloo ranks, real files. Starts cost seconds, so each run here serves several questions.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from configs.corpus import CorpusConfig
from data_prep.pipeline import prepare
from pretrain.checkpoint_folders import complete_checkpoints
from pretrain.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parent.parent
STEPS = 8


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small prepared corpus and a run's YAML."""
    folder = tmp_path_factory.mktemp("end_to_end")
    corpus = {
        "output": str(folder / "corpus"),
        "sources": [
            {"kind": "text_tree", "name": "json", "path": "{stdlib}/json", "pattern": "**/*.py"},
            {"kind": "text_tree", "name": "email", "path": "{stdlib}/email", "pattern": "**/*.py"},
        ],
        "tokenizer": {"kind": "train_sentencepiece", "vocab_size": 512, "sample_bytes": 300000},
        "heldout_fraction": 0.2,
        "workers": 1,
    }
    prepare(CorpusConfig.check(corpus, "test"))
    heldout = [str(path) for path in sorted((folder / "corpus/heldout").iterdir())]
    run: dict[str, Any] = {
        "name": "small",
        "run_dir": str(folder / "run"),
        "model": {
            "vocab_size": 512, "lm_z_coef": 0.01,
            "num_layers": 2, "width": 32, "attention": {"num_heads": 2, "head_width": 16},
            "ffn": {"width": 64},
            "moe": {"num_experts": 4, "expert": {"width": 48}, "router": {"kind": "topk"}},
        },
        "parallel": {"expert": 2},
        "data": {
            "sources": [
                {"name": "json", "path": str(folder / "corpus/train/json"), "weight": 0.3},
                {"name": "email", "path": str(folder / "corpus/train/email"), "weight": 0.7},
            ],
            "heldout": heldout,
        },
        "train": {
            "steps": STEPS, "sequence_length": 32, "batch_tokens": 256, "micro_batch_sequences": 2,
            "optimizer": {"peak_lr": 1e-2}, "schedule": {"kind": "cosine", "warmup_steps": 2}, "precision": "float32",
            "log_every_steps": 1, "eval_every_steps": 4, "eval_sequences": 8, "save_every_steps": 100,
        },
    }  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(run))
    return folder


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def launch(home: Path, launcher: str, *overrides: str, env: dict[str, str] | None = None) -> subprocess.Popen[str]:
    tool = str(Path(sys.executable).parent / launcher)
    doors = {
        "deepspeed": [tool, "--num_accelerators", "2", "--master_port", free_port()],
        "torchrun": [tool, "--nproc-per-node", "2", "--master-port", free_port()],
        "python": [sys.executable],
    }
    command = [*doors[launcher], "pretrain/main.py", "--config", str(home / "run.yaml"), *overrides]
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | (env or {})
    )


def finish(process: subprocess.Popen[str], code: int = 0) -> str:
    output, _ = process.communicate(timeout=180)
    assert process.returncode == code, output
    return output


def train_losses(run: Path) -> list[tuple[int, float]]:
    return [(r["step"], r["loss"]) for r in read_metrics(run) if r["kind"] == "train"]


@pytest.fixture(scope="module")
def whole(home: Path) -> Path:
    """The run that never stops: 2 ranks, experts over both, through the deepspeed launcher, by a stale build lock."""
    run = home / "whole"
    lock = home / "extensions/deepspeed_shm_comm/lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    before = set(os.listdir("/dev/shm"))
    finish(launch(home, "deepspeed", f"run_dir={run}", env={"TORCH_EXTENSIONS_DIR": str(home / "extensions")}))
    left = {name for name in set(os.listdir("/dev/shm")) - before if "deepspeed" in name}
    assert not left  # and it ended at all, though a build lock lay there
    return run


def test_run_folder_holds_everything(whole: Path) -> None:
    assert [step for step, _ in train_losses(whole)] == list(range(1, STEPS + 1))
    assert [path.name for path in complete_checkpoints(whole)] == [f"step-{STEPS:08d}"]
    assert len(list(complete_checkpoints(whole)[0].glob("rank-*.safetensors"))) == 2  # each rank wrote its part
    assert (whole / "config.yaml").exists() and list((whole / "tensorboard").glob("events*"))
    record = next(r for r in read_metrics(whole) if r["kind"] == "train")
    assert {"lr", "grad_norm", "tokens_per_s", "layer_00/max_over_mean", "layer_00/load_entropy"} <= set(record)
    assert record["layer_00/dropped"] == 0.0
    evaluated = [r for r in read_metrics(whole) if r["kind"] == "eval"]
    assert [r["step"] for r in evaluated] == [4, 8] and evaluated[1]["bits_per_byte"] < evaluated[0]["bits_per_byte"]


def test_stopped_and_resumed_equals_never_stopped(home: Path, whole: Path) -> None:
    """Stopped by its own count, then by a signal to its ranks, then finished: figures and final weights to the bit."""
    run = home / "parts"
    said = finish(launch(home, "deepspeed", f"run_dir={run}", "train.stop_after_steps=2"), code=3)
    assert "stopped after step 2" in said
    process = launch(home, "torchrun", f"run_dir={run}", "train.steps=100000", "train.schedule.warmup_steps=2")
    deadline = time.monotonic() + 90
    while not any(r["step"] > 3 for r in read_metrics(run)) and time.monotonic() < deadline:
        time.sleep(0.2)
    for rank in ranks_of(process.pid):
        os.kill(rank, signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert "stopped after step" in output and "SIGTERM" in output, output
    (run / "checkpoints" / complete_checkpoints(run)[-1].name).rename(home / "elsewhere")  # it had another schedule
    finish(launch(home, "deepspeed", f"run_dir={run}"))
    assert train_losses(run) == train_losses(whole)
    one, two = (complete_checkpoints(folder)[-1] for folder in (run, whole))
    for file in sorted(two.glob("rank-*.safetensors")):
        assert (one / file.name).read_bytes() == file.read_bytes()
    again = finish(launch(home, "deepspeed", f"run_dir={run}"))
    assert "done: 8 steps" in again  # a finished run stays finished
    assert train_losses(run) == train_losses(whole)


def ranks_of(parent: int) -> list[int]:
    """Processes a launcher started."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children if "main.py" in Path(f"/proc/{child}/cmdline").read_text()]


def test_one_rank_and_two_see_the_same_samples(home: Path, whole: Path) -> None:
    """Plain python, one rank, no expert parallelism, resumed by two: the losses are those of the whole run."""
    run = home / "alone"
    finish(launch(home, "python", f"run_dir={run}", "parallel.expert=1", "train.stop_after_steps=3"), code=3)
    finish(launch(home, "torchrun", f"run_dir={run}", "train.micro_batch_sequences=4"))
    for (step, loss), (wanted_step, wanted) in zip(train_losses(run), train_losses(whole), strict=True):
        assert step == wanted_step and loss == pytest.approx(wanted, rel=1e-4)  # float32 sums in another order


def test_evaluate_generate_report(whole: Path) -> None:
    glam = [sys.executable, "-m", "pretrain.cli"]
    found = subprocess.run([*glam, "eval", str(whole), "--json"], cwd=ROOT, capture_output=True, text=True, check=True)
    figures = json.loads(found.stdout)
    last = [r for r in read_metrics(whole) if r["kind"] == "eval"][-1]
    assert figures["loss"] == pytest.approx(last["loss"], rel=1e-5)  # one process = two ranks
    assert figures["bits_per_byte"] == pytest.approx(last["bits_per_byte"], rel=1e-5)
    assert 0 < figures["order0_bits_per_byte"] < 8
    command = [*glam, "generate", str(whole), "--prompt", "def f", "--max-tokens", "12"]
    texts = [subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert texts[0].startswith("def f") and texts[0] == texts[1]  # seeded
    explain = [*glam, "prep", "explain", str(whole), "--step", "5", "--json"]
    told = subprocess.run(explain, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    documents = json.loads(told)["documents"]
    assert sum(one["tokens"] for one in documents) == 8 * 33  # 8 sequences of 32 tokens and a label
    assert {one["data_rank"] for one in documents} == {0, 1}
    assert all(one["first_line"] in Path(one["origin"]).read_text() for one in documents)
    subprocess.run([*glam, "report", str(whole)], cwd=ROOT, check=True, capture_output=True)
    assert (whole / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
