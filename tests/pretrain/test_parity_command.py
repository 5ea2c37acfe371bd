"""`glam parity` as a user meets it: layouts read and refused, exit codes, the table, JSON, launched ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from configs.run import RunConfig
from pretrain import budget
from pretrain.parity import TOLERANCE, judge, likely_cause
from pretrain.parity_ranks import Figures
from pretrain.trials import make_trials
from slurm.environ import free_port
from tests.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[2]
PRESETS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if not path.name.startswith("corpus"))


def parity(*arguments: str, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*launcher] if launcher else [sys.executable]
    return subprocess.run(
        [*command, "-m", "pretrain.cli", "parity", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


# ---- reading layouts ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("layout", "told"),
    [
        ("tp=2,pq=2", ("'pq'", "one of dp, tp, cp, pp")),
        ("tp=two", ("'tp=two'", "tp=<number>")),
        ("dp=0", ("'dp=0'", "at least 1")),
        ("tp=3", ("parallel.tensor=3", "num_heads=2", "nearest that works: parallel.tensor=2")),
        ("cp=4", ("parallel.context=4 x parallel.tensor=1", "num_heads=2", "nearest that works: parallel.context=2")),
        ("pp=5", ("parallel.pipeline=5", "model.num_layers=4", "parallel.pipeline=4")),
        ("ep=2", ("parallel.expert=2", "1 rank(s)")),
        ("ep=3,dp=3", ("parallel.expert=3", "num_experts=4")),
        ("dp=128", ("128 rank(s)", "at most 64")),
        ("pp=2,schedule=zigzag", ("parallel.schedule", "zigzag")),
        ("pp=2,schedule=dualpipev,mb=2", ("needs 4 micro-batches", "nearest")),
    ],
)
def test_impossible_layout_is_refused(layout: str, told: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as met:
        make_trials(tiny_config(), [layout], micro_batches=4, full_size=True)
    assert all(part in str(met.value) for part in told), str(met.value)


def test_noisy_router_is_refused_with_a_remedy() -> None:
    with pytest.raises(UserError, match="noisy_topk"):
        make_trials(tiny_config("model.moe.router={kind: noisy_topk}"), ["dp=2"], micro_batches=1, full_size=True)


def test_layouts_share_one_batch() -> None:
    trials = make_trials(tiny_config(), ["dp=2,mb=3", "dp=4", "tp=2,mb=1"], micro_batches=2, full_size=True)
    assert {trial.config.train.batch_sequences for trial in trials} == {24}
    assert [trial.config.train.num_micro_batches(d) for trial, d in zip(trials, (2, 4, 1))] == [3, 2, 1]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_shrinks_to_a_run_of_its_own_kind(path: Path) -> None:
    """Without `--layout`: the configured degrees, at most two each; small, yet with all that makes the model."""
    preset = RunConfig.load(path)
    [trial] = make_trials(preset, [], micro_batches=4, full_size=False)
    small, whole = trial.config.model, preset.model
    assert trial.ranks <= 8 and budget.parameters(small).total < 300_000
    assert (small.moe is None) == (whole.moe is None)
    for part in ("tied_embedding", "lm_z_coef"):
        assert getattr(small, part) == getattr(whole, part)
    assert small.attention.position == whole.attention.position and small.attention.qk_norm == whole.attention.qk_norm
    grouped, whole_grouped = (m.attention.kv_heads < m.attention.num_heads for m in (small, whole))
    assert grouped == whole_grouped
    assert small.moe is None or whole.moe is None or small.moe.router == whole.moe.router


SPARSE = "model.attention.sparse={layout: %s}"
LAYOUTS = (
    "{kind: bigbird, sinks: 2, window: 5, random: 9}",
    "{kind: window, window: 20}",
    "{kind: strided, stride: 9}",
    "{kind: etc, segment_tokens: 512, window: 4, summary_tokens: 64}",
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_block_sparse_attention_shrinks_with_the_sequence(layout: str) -> None:
    overrides = (SPARSE % layout, "model.attention.document_end=31000", "parallel={data: 1, context: 8, tensor: 2}")
    preset = RunConfig.load(ROOT / "configs" / "glam_8b_64e.yaml", overrides)
    [trial] = make_trials(preset, [], micro_batches=1, full_size=False)
    attention = trial.config.model.attention
    assert (trial.layout, trial.ranks, trial.config.train.sequence_length) == ("tp=2,cp=2", 4, 128)
    assert attention.sparse is not None and attention.sparse.layout.kind in layout
    assert attention.document_end == trial.config.model.vocab_size - 1


def test_a_shrunk_model_still_carries_large_layouts() -> None:
    preset = RunConfig.load(ROOT / "configs" / "glam.yaml")
    [trial] = make_trials(preset, ["tp=8,pp=4,ep=16,dp=2"], micro_batches=1, full_size=False)
    assert trial.ranks == 64 and trial.config.model.num_layers == 4


# ---- judging --------------------------------------------------------------------------------------------------------
def figures(scale: float = 1.0, nan: bool = False) -> Figures:
    wanted = torch.arange(1.0, 7.0).view(2, 3)
    boxes = {"a": [((0, 0), wanted.clone())], "b": [((0, 0), wanted * scale)]}
    if nan:
        boxes["b"][0][1][1, 2] = float("nan")
    return Figures([2.0], [3.0], {0: 1.0}, {0: 0.5}, [{0: [4.0, 4.0]}], 2.0, boxes, {"a": boxes["a"]})


def test_first_departure_is_named_with_rank_ratio_and_cause() -> None:
    config = tiny_config("parallel.expert=2")
    verdict = judge("ep=2", config, [figures(), figures(2.0)], figures(), TOLERANCE)
    first = verdict.departure
    assert first is not None and not verdict.agrees
    assert (first.what, first.tensor, first.rank, first.ratio) == ("gradients", "b", 1, 2.0)
    assert "2 expert ranks" in first.cause and "2 expert ranks" in str(first)
    assert judge("ep=2", config, [figures(), figures()], figures(), TOLERANCE).agrees


def test_a_value_that_is_no_number_departs() -> None:
    verdict = judge("dp=1", tiny_config(), [figures(nan=True)], figures(), TOLERANCE)
    assert verdict.departure is not None and verdict.departure.tensor == "b"
    json.loads(json.dumps(verdict.as_json(), allow_nan=False))


def test_a_part_that_lies_nowhere_departs() -> None:
    found = figures()
    found.gradients["b"] = [((0, 0), found.gradients["b"][0][1][:1])]
    verdict = judge("dp=1", tiny_config(), [found], figures(), TOLERANCE)
    assert verdict.departure is not None and "lies nowhere" in verdict.departure.tensor


def test_causes() -> None:
    config = tiny_config("parallel={tensor: 2, expert: 4}", "train.micro_batch_sequences=1")
    assert likely_cause(4.0, config, 4) == "counted once for each of the 4 expert ranks or 4 micro-batches?"
    assert likely_cause(0.5, config, 4) == "only one's share of the 2 tensor ranks or 2 data ranks?"
    assert likely_cause(1.3, config, 4) == ""


# ---- the command ----------------------------------------------------------------------------------------------------
def test_command_agrees_and_tells_in_json() -> None:
    done = parity("configs/demo.yaml", "--layout", "tp=2,pp=2", "--layout", "ep=2,dp=2", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)  # nothing else on standard output
    assert told["agree"] and [layout["ranks"] for layout in told["layouts"]] == [4, 2]
    for layout in told["layouts"]:
        assert layout["agrees"] and layout["departure"] is None
        assert set(layout["errors"]) == {"loss", "balance", "z", "norm", "gradients", "weights", "heldout"}
        assert 0 < layout["errors"]["gradients"] < told["tolerance"] == TOLERANCE


def test_command_exits_with_1_where_a_layout_departs() -> None:
    """A tolerance below float32's own rounding: no layout but one process itself can meet it."""
    done = parity("configs/demo.yaml", "--layout", "tp=2", "--tolerance", "1e-12", "--steps", "1")
    assert done.returncode == 1, done.stderr
    assert "departs" in done.stdout and "ratio 1.0000" in done.stdout


def test_command_refuses_bad_input_with_2() -> None:
    done = parity("configs/demo.yaml", "--layout", "tp=3,dp=2")
    assert done.returncode == 2 and "parallel.tensor=3" in done.stderr and "Traceback" not in done.stderr


def test_command_uses_the_ranks_of_a_launcher() -> None:
    """As inside a job, before its first step."""
    torchrun = (str(Path(sys.executable).parent / "torchrun"), "--nproc-per-node=4", f"--master-port={free_port()}")
    done = parity("configs/demo.yaml", "--layout", "tp=2,pp=2", "--layout", "dp=4,ep=2", "--json", launcher=torchrun)
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(done.stdout)
    assert told["agree"] and [layout["ranks"] for layout in told["layouts"]] == [4, 4]
