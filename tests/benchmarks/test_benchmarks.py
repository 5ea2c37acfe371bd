"""Each benchmark runs at its smallest size and answers in valid JSON; the stopwatch and the scales are right.

No test asserts a speed: machines are shared, and a benchmark that fails on a busy one would be turned off.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import moe_layer
from benchmarks.moe_peers import Ours, candidates, draw_weights
from benchmarks.timing import Times, in_fresh_process, paired_times, peak_bytes

ROOT = Path(__file__).resolve().parents[2]


def run_benchmark(module: str, *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{module}", "--smoke", "--json", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)  # nothing but the object on standard output
    assert result["benchmark"] == module and result["size"] == "smoke" and result["notes"]
    assert result["machine"]["torch"] == torch.__version__
    assert result["machine"]["threads"] == 1 and result["machine"]["device"] and result["machine"]["clock"]
    for row in result["rows"]:
        assert row["case"] and row["candidate"]
        for key in ("ratio", "milliseconds", "seconds", "memory_ratio", "peak_mb", "tokens_per_s", "ratio_to_dense"):
            if key in row:
                assert math.isfinite(row[key]) and row[key] >= 0, (key, row)
        assert row.get("ratio", 1.0) > 0
    return result


def by_name(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["candidate"]: row for row in result["rows"]}


def test_moe_layer_measures_every_peer_and_their_outputs_agree_with_ours() -> None:
    rows = by_name(run_benchmark("moe_layer"))
    assert set(rows) == {candidate.name for candidate in candidates()}
    for candidate in candidates():
        row = rows[candidate.name]
        if "did not run" in row.get("note", ""):  # a peer that is not installed, or not for this torch
            assert candidate.name not in ("dense", "ours", "dense, gated", "ours, gated")
            continue
        assert row["ratio"] > 0 and row["load"] == pytest.approx(1.5, abs=0.1) and "note" not in row
        if candidate.dropless and not candidate.name.startswith("ours"):
            assert row["difference"] < 1e-4
    # Of so small a layer the process may find room in what it holds already, so a peak of 0 MB is no fault.
    assert rows["ours"]["target"] and "peak_mb" in rows["ours"]


def test_vocabulary_loss() -> None:
    rows = by_name(run_benchmark("vocabulary_loss"))
    ours = rows["ours, chunked"]
    assert ours["ratio"] > 0 and ours["difference"] < 1e-5
    assert 0 < ours["memory_ratio"] < 1  # eight chunks hold less than all logits: a matter of size, not of speed
    assert rows["all logits at once"]["ratio"] == 1


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_training_step_trainer_and_bare_loop_learn_alike(dtype: str) -> None:
    result = run_benchmark("training_step", "--dtypes", dtype)
    losses: dict[str, list[float]] = {}
    for row in result["rows"]:
        losses.setdefault(row["case"], []).append(row["loss"])
        assert row["tokens_per_s"] > 0 and row["dtype"] == dtype
    assert set(losses) == {f"dense {dtype}", f"moe {dtype}"}
    for trainer, bare in losses.values():
        assert trainer == pytest.approx(bare, rel=1e-5 if dtype == "float32" else 5e-3)


def test_startup_accounts_for_every_second() -> None:
    result = run_benchmark("startup", "--launches", "plain python")
    seconds = {(row["case"], row["candidate"]): row["seconds"] for row in result["rows"]}
    assert {name for case, name in seconds if case == "floor"} >= {"import torch", "import deepspeed"}
    run = {name: value for (case, name), value in seconds.items() if case == "plain python"}
    assert {"launcher and imports", "engine", "first step"} <= set(run)
    parts = sum(run.values()) - run["command to first step"] - run["checkpoint and end"]
    assert parts == pytest.approx(run["command to first step"], rel=0.02)


def test_layouts_watches_each_rank() -> None:
    [row] = run_benchmark("layouts", "--layouts", "{data: 2}")["rows"]
    assert row["case"] == "2" and row["tokens_per_s"] > 0 and row["peak_mb"] > 100 and row["ratio"] == 1
    assert row["seconds"] > 1


def test_checkpoint_measures_disk_peers_and_stall() -> None:
    result = run_benchmark("checkpoint")
    rows = by_name(result)
    assert {"write: ours", "write: DCP", "read: ours, verified first", "at once", "beside training"} <= rows.keys()
    assert rows["write: bare disk"]["ratio"] == 1 and rows["at once"]["stall_s"] > 0


def test_checkpoint_scale_adds_up() -> None:
    [row] = run_benchmark("checkpoint_scale")["rows"]  # it asserts that the boxes are the state, byte for byte
    assert row["boxes"] >= 8 and row["manifest_mb"] > 0


def test_data_prep_measures_every_case() -> None:
    rows = run_benchmark("data_prep")["rows"]
    ratios = {(row["case"], row["candidate"]): row.get("ratio") for row in rows}
    for algorithm in ("unigram", "bpe"):
        case = f"tokenize, {algorithm} 1,000"
        assert ratios[case, "tokenizer alone"] == 1 and ratios[case, "ours"] > 0
        assert ratios[case, "Megatron-LM's way"] > 0
    stages = {row["candidate"] for row in rows if row["case"].startswith("stages")}
    assert {"read", "clean", "dedup: signatures", "tokenizer", "tokenize", "shards: write"} <= stages
    assert all(row["peak_mb"] > 30 for row in rows if row["case"].startswith("memory"))
    [start] = [row for row in rows if row["case"] == "start"]
    assert 0 < start["seconds"] < 60


MODULES = ["checkpoint", "checkpoint_scale", "data_prep", "moe_layer", "vocabulary_loss", "training_step", "startup"]
MODULES += ["layouts"]


@pytest.mark.parametrize("module", MODULES)
def test_help_shows_an_example(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    import importlib

    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"benchmarks.{module}").main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "example:" in shown and f"benchmarks.{module}" in shown and "--quick" in shown


def test_ratio_is_taken_round_by_round() -> None:
    # A machine that slows down threefold in the last rounds must not change a ratio of 2.
    times = Times({"a": [2.0, 2.0, 6.0, 6.0, 6.0], "base": [1.0, 1.0, 3.0, 3.0, 3.0]})
    assert times.ratio("a", "base") == 2.0 and times.spread("a", "base") == 0.0 and times.median("a") == 6.0


def test_candidates_take_turns_there_and_back() -> None:
    seen: list[str] = []
    steps = {name: (lambda name=name: seen.append(name)) for name in "abc"}
    times = paired_times(steps, rounds=2, device=torch.device("cpu"), warmup=1)
    assert "".join(seen) == "abc" + "abc" + "cba"
    assert all(len(seconds) == 2 for seconds in times.seconds.values())


def test_peak_memory_counts_what_is_held_at_once() -> None:
    # 64 MB held together, then freed, then 32 MB: the peak is 64.
    code = (
        "import torch; from benchmarks.timing import peak_bytes\n"
        "def step():\n"
        "    a = [torch.ones(2**22), torch.ones(2**22), torch.ones(2**22), torch.ones(2**22)]; del a\n"
        "    torch.ones(2**23)\n"
        "step(); print(peak_bytes(step, torch.device('cpu')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) == pytest.approx(64 * 2**20, rel=0.05)
    assert peak_bytes(lambda: None, torch.device("cpu")) < 2**22


def test_a_failing_child_says_why() -> None:
    with pytest.raises(RuntimeError, match="no_such_module"):
        in_fresh_process("benchmarks.no_such_module", [])


@pytest.mark.parametrize("load", [1.5, 3.0, 6.0])
def test_skewed_input_has_the_load_asked_for(load: float) -> None:
    case = moe_layer.Case("skewed", 16, load, 1.2)
    spec = moe_layer.Size(1024, 64, (case,), 1, ("float32",), 1.0)
    weights = draw_weights(16, 64, 32, gated=False, dtype=torch.float32, device=torch.device("cpu"))
    x_TD = moe_layer._input(case, weights, spec)
    routing = Ours(weights).moe.router(x_TD[None])
    load_E = torch.bincount(routing.expert_TK.flatten(), minlength=16)
    assert float(load_E.max() / load_E.float().mean()) == pytest.approx(load, rel=0.05)


def test_attention() -> None:
    rows = by_name(run_benchmark("attention", "--no-memory"))
    assert {"SDPA, causal", "dense mask"} < rows.keys() and len(rows) > 2
    for name, row in rows.items():
        assert row["ratio"] > 0 and "note" not in row
        if name.startswith("ours"):
            assert row["difference"] < (1e-5 if row["dtype"] == "float32" else 2e-2) and 0 < row["ideal"] < 1


def test_attention_learning_trains_twins_that_differ_in_attention_only(corpus: Path, tmp_path: Path) -> None:
    arguments = ("--data", str(corpus), "--runs", str(tmp_path), "--seeds", "3", "--jobs", "2", "--steps", "2")
    rows = by_name(run_benchmark("attention_learning", *arguments))
    assert rows["full"]["difference"] == 0 and rows["bigbird"]["difference"] != 0
    assert rows["full"]["tokens_seen"] == rows["bigbird"]["tokens_seen"] == 2 * 512
    again = by_name(run_benchmark("attention_learning", *arguments))
    assert again["bigbird"]["loss"] == rows["bigbird"]["loss"] and "seconds" not in again["bigbird"]
