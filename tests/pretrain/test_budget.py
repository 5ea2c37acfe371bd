"""The numbers of a run: parameters against the model itself, FLOPs against a counter, bytes against what must hold."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from configs.model import ModelConfig
from configs.run import PRESETS, RunConfig
from model.glam import GLaM
from model.init import initial_value
from model.patterns import block_layout
from parallel.stages import cut_by_cost
from pretrain import budget
from tests.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[2]
RUNS = sorted(path.stem for path in PRESETS.glob("*.yaml") if not path.name.startswith("corpus"))
TWINS: dict[str, tuple[str, ...]] = {"sparse": (), "dense": ("model.moe=null", "parallel.expert=1")}


def preset(name: str, *overrides: str) -> RunConfig:
    return RunConfig.load(PRESETS / f"{name}.yaml", overrides)


def on_meta(model: ModelConfig) -> GLaM:
    with torch.device("meta"):
        return GLaM(model)


# ---- parameters -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", RUNS)
@pytest.mark.parametrize("twin", TWINS)
def test_formula_counts_the_model_that_is_built(name: str, twin: str) -> None:
    config = preset(name, *TWINS[twin]).model
    counts, model = budget.parameters(config), on_meta(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == counts.total
    assert (counts.active == counts.total) == (twin == "dense")


@st.composite
def models(draw: st.DrawFn) -> ModelConfig:
    """Small models over all that changes a shape."""
    kv_heads, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    every = draw(st.integers(1, 3))
    moe = {
        "num_experts": draw(st.integers(2, 6)),
        "every": every,
        "offset": draw(st.integers(0, every - 1)),
        "expert": {"width": draw(st.integers(1, 20)), "gated": draw(st.booleans())},
        "router": draw(
            st.sampled_from(
                [
                    {"kind": "topk", "k": 1},
                    {"kind": "topk", "k": 2},
                    {"kind": "noisy_topk", "k": 2},
                    {"kind": "expert_choice", "allow_noncausal": True},
                ]
            )
        ),
    }
    tree: dict[str, Any] = {
        "vocab_size": draw(st.integers(1, 50)),
        "num_layers": draw(st.integers(1, 7)),
        "width": draw(st.integers(1, 20)),
        "attention": {
            "num_heads": kv_heads * groups,
            "num_kv_heads": kv_heads,
            "head_width": 2 * draw(st.integers(1, 5)),
            "qk_norm": draw(st.booleans()),
            "position": draw(st.sampled_from([{"kind": "rotary"}, {"kind": "relative_bias", "num_buckets": 5}])),
        },
        "ffn": {"width": draw(st.integers(1, 30)), "gated": draw(st.booleans())},
        "moe": draw(st.sampled_from([None, moe])),
        "tied_embedding": draw(st.booleans()),
    }
    return ModelConfig.check(tree, where="test")


@settings(max_examples=50, deadline=None)
@given(models())
def test_formula_counts_any_model_part_by_part(config: ModelConfig) -> None:
    counts, sizes = budget.parameters(config), {n: p.numel() for n, p in on_meta(config).named_parameters()}

    def total(*parts: str) -> int:
        return sum(size for name, size in sizes.items() if any(part in name for part in parts))

    assert sum(sizes.values()) == counts.total
    assert counts.experts == total(".experts.")
    assert counts.position == total("bias.table")
    assert counts.embedding == total("embed.", "head.")
    assert counts.norms == total("norm.")
    assert counts.active <= counts.total
    whole = cut_by_cost([1.0] * config.num_layers, 0.0, 1)
    assert budget.stage_parameters(config, whole, 0) == (counts.total - counts.experts, counts.experts, 0)


@pytest.mark.parametrize("name", RUNS)
def test_stages_together_hold_the_model(name: str) -> None:
    """Every parameter lies on one stage; a tied embedding is copied to the last, where that is not the first."""
    for pipeline, schedule in ((2, "1f1b"), (4, "1f1b"), (2, "dualpipev")):
        config = preset(name, f"parallel.pipeline={pipeline}", f"parallel.schedule={schedule}")
        m, counts, cut = config.model, budget.parameters(config.model), budget.stages(config)
        held = [budget.stage_parameters(m, cut, stage) for stage in range(pipeline)]
        dense, experts, copied = (sum(part) for part in zip(*held))
        assert (dense, experts) == (counts.total - counts.experts, counts.experts)
        assert copied == (m.vocab_size * m.width if m.tied_embedding and schedule == "1f1b" else 0)


@pytest.mark.parametrize("name", RUNS)
def test_flops_of_blocks_and_head_are_the_models(name: str) -> None:
    config = preset(name)
    m, length = config.model, config.train.sequence_length
    blocks = budget.block_flops(m, length)
    assert round(sum(blocks) + 6 * m.vocab_size * m.width) == budget.flops_per_token(m, length)
    assert all((blocks[n] == blocks[0]) == (m.is_moe(n) == m.is_moe(0)) for n in range(m.num_layers))


# ---- FLOPs ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("overrides", [(), ("ffn.gated=false",), ("attention.num_kv_heads=2",)], ids=str)
@pytest.mark.parametrize("length", [16, 64])
def test_flops_against_a_counter(overrides: tuple[str, ...], length: int) -> None:
    """Forward and backward of a dense model, counted operator by operator.

    A kernel multiplies whole S x S score matrices and masks half of them; ours counts the (S + 1) / 2 keys that a
    causal row uses. With that one difference added the two agree to the last operation: the counter sees matrix
    products only, and so does the formula.
    """
    from configs.base import set_dotted

    tree: dict[str, Any] = {
        "vocab_size": 96, "num_layers": 3, "width": 24, "attention": {"num_heads": 4, "head_width": 8},
        "ffn": {"width": 40},
    }  # fmt: skip
    for item in overrides:
        set_dotted(tree, item)
    config = ModelConfig.check(tree, where="test")
    model = on_meta(config).to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, tuple(parameter.shape), config, seed=0))
    tokens = torch.randint(0, 96, (2, length + 1), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        hidden = tokens[:, :-1]
        for layer in model.layers():
            hidden = layer(hidden)
        model.loss(hidden, tokens[:, 1:]).backward()  # type: ignore[no-untyped-call]
    masked_keys = length - (length + 1) / 2
    masked = config.num_layers * 12 * config.attention.num_heads * config.attention.head_width * masked_keys
    assert counter.get_total_flops() / tokens[:, 1:].numel() == budget.flops_per_token(config, length) + masked


@pytest.mark.parametrize("name", RUNS)
def test_flops_are_six_a_weight_and_attention(name: str) -> None:
    """6 for each active weight of a product, less what attention adds: the rule of thumb, met within its own terms."""
    config = preset(name, "model.attention.sparse=null")  # keys grow linearly where all are seen
    counts, length = budget.parameters(config.model), config.train.sequence_length
    flops, twice = (budget.flops_per_token(config.model, s) for s in (length, 2 * length + 1))
    scores = twice - flops  # linear in the mean number of keys, which has doubled
    table = config.model.vocab_size * config.model.width
    weights = counts.active - counts.norms - counts.position - (0 if config.model.tied_embedding else table)
    assert flops - scores == pytest.approx(6 * weights, rel=1e-12)


# ---- bytes ------------------------------------------------------------------------------------------------------
def test_bytes_shrink_as_degrees_grow() -> None:
    """Experts spread over ranks take weights, gradients and state with them; more data ranks share the state."""
    runs = [preset("glam_8b_64e", f"parallel.expert={degree}") for degree in (1, 2, 4, 8, 16, 32, 64)]
    by_expert = [budget.bytes_per_rank(config, 64) for config in runs]
    for less, more in zip(by_expert[1:], by_expert):
        assert less.total < more.total and less.weights < more.weights and less.gradients < more.gradients
    by_data = [budget.bytes_per_rank(preset("glam_1.7b_64e", "parallel.expert=16"), ranks) for ranks in (16, 32, 64)]
    for less, more in zip(by_data[1:], by_data):
        assert less.optimizer < more.optimizer and (less.weights, less.gradients) == (more.weights, more.gradients)
    config = preset("glam", "parallel.data=auto", "parallel.expert=1")
    by_tensor = [budget.bytes_per_rank(preset("glam", f"parallel.tensor={t}"), 16 * t * 8) for t in (1, 2, 4, 8)]
    assert all(less.weights < more.weights for less, more in zip(by_tensor[1:], by_tensor))
    assert budget.bytes_per_rank(config, 64).total > 10 * by_tensor[-1].total


@pytest.mark.parametrize("name", ["demo", "glam_0.1b_64e", "modern"])
def test_bytes_on_one_rank_follow_from_the_count(name: str) -> None:
    """One rank holds everything: weights in their type, float32 gradients, and 12 bytes of master and moments."""
    config = preset(name, "parallel.expert=1")
    total, found = budget.parameters(config.model).total, budget.bytes_per_rank(config, 1)
    assert found.weights == total * (4 if config.train.precision == "float32" else 2)
    assert (found.gradients, found.optimizer) == (4 * total, 12 * total)


def test_context_ranks_share_activations_and_optimizer_state() -> None:
    """As data ranks share the state, and besides their part of every sequence is all that is there."""
    longer = ("train.sequence_length=8192", "parallel.expert=16")
    plain, cut = (preset("glam_1.7b_64e", *longer, f"parallel.context={n}") for n in (1, 4))
    a, b, as_data = (budget.bytes_per_rank(c, ranks) for c, ranks in ((plain, 16), (cut, 64), (plain, 64)))
    assert b.activations == pytest.approx(a.activations / 4, rel=0.01)
    assert (b.weights, b.gradients, b.optimizer) == (as_data.weights, as_data.gradients, as_data.optimizer)


def test_recompute_saves_activations_only() -> None:
    kept, rebuilt = (preset("glam_1.7b_64e", f"train.recompute={value}") for value in ("false", "true"))
    a, b = budget.bytes_per_rank(kept, 16), budget.bytes_per_rank(rebuilt, 16)
    assert b.activations < a.activations / 4
    assert (a.weights, a.gradients, a.optimizer, a.logits) == (b.weights, b.gradients, b.optimizer, b.logits)


# ---- energy -----------------------------------------------------------------------------------------------------
def test_energy_of_the_paper() -> None:
    """1,024 chips of 326 W for 574 h at PUE 1.11: 280B tokens. 600B take 600/280 of it."""
    first = budget.energy_mwh(chips=1024, hours=574, watts_a_chip=326, pue=1.11)
    assert f"{first:.1f}" == "212.7"
    assert f"{budget.energy_mwh(1024, 574 * 600 / 280, 326, 1.11):.1f}" == "455.8"
    assert budget.energy_mwh(2048, 574, 326, 1.11) == pytest.approx(2 * first)


# ---- glam plan --------------------------------------------------------------------------------------------------
def plan(*arguments: str) -> tuple[dict[str, Any], float]:
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pretrain.cli", "plan", *arguments, "--json"],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return json.loads(done.stdout), time.perf_counter() - began


def test_plan_of_the_largest_in_seconds() -> None:
    """No device, no torch: the plan of 1.2T parameters comes at once."""
    found, seconds = plan("configs/glam.yaml")
    config = preset("glam")
    assert seconds < 5
    assert (found["total_params"], found["active_params"]) == (1_161_756_418_048, 96_604_528_640)
    assert found["flops_per_token"] == budget.flops_per_token(config.model, 1024)
    assert found["ranks"] == 1024
    assert found["bytes_per_rank"] == budget.bytes_per_rank(config, 1024).total
    assert found["bytes_per_rank"] == sum(found["bytes"].values())
    assert found["checkpoint_bytes"] == 12 * found["total_params"]
    required = ("total_params", "active_params", "flops_per_token", "bytes_per_rank")
    assert all(type(found[key]) is int for key in required)
    assert found["stage_layers"] == [8, 8, 8, 8, 8, 8, 9, 7]  # the last stage also holds the vocabulary of 256,000


def test_plan_takes_overrides_and_ranks() -> None:
    few, _ = plan("configs/glam_1.7b_64e.yaml")
    many, _ = plan("configs/glam_1.7b_64e.yaml", "parallel.expert=64", "--ranks", "128")
    assert (few["ranks"], many["ranks"]) == (16, 128)
    assert many["bytes_per_rank"] < few["bytes_per_rank"] and many["total_params"] == few["total_params"]


def test_preset_head_states_its_own_plan() -> None:
    """FLOPs, bytes and ranks in each head comment are what the plan says today."""
    for name in RUNS:
        text, config = (PRESETS / f"{name}.yaml").read_text(encoding="utf-8"), preset(name)
        if "glam plan:" not in text:
            continue
        ranks = int(text.split(" GiB a rank on ")[1].split(". ")[0].replace(",", ""))
        flops = budget.flops_per_token(config.model, config.train.sequence_length)
        assert f"{float(text.split(' active, ')[1].split(' FLOPs')[0]):.3g}" == f"{flops:.3g}", name
        assert f"{budget.bytes_per_rank(config, ranks).total / 2**30:.1f} GiB a rank" in text, name


@pytest.mark.parametrize("layout", ["{kind: full}", "{kind: bigbird}", "{kind: window}", "{kind: strided, stride: 3}"])
def test_block_sparse_attention_is_counted_by_what_it_looks_at(layout: str) -> None:
    long = ("train.sequence_length=128", "train.batch_tokens=256")
    model = tiny_config(f"model.attention.sparse={{block_size: 16, layout: {layout}, pattern: SF}}", *long).model
    assert model.attention.sparse is not None
    position = torch.arange(128)
    visible = block_layout(model.attention.sparse, 0, range(1), 128).visible(position, position)
    keys = float(visible.float().sum() / 128)
    assert budget.keys_a_query(model, 128) == pytest.approx(keys)
    full, sparse = (budget.flops_per_token(m, 128) for m in (tiny_config(*long).model, model))
    assert full - sparse == pytest.approx(2 * 12 * 2 * 24 * (64.5 - keys), abs=1)
