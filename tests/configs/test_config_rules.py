"""Rules within and between sections: each has a failing case whose message names both values, and a neighbour that
passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.errors import UserError
from configs.layout import LAYOUT_RULES, layout_faults, nearest_layout
from configs.parallel import ParallelConfig
from configs.run import RULES, RunConfig
from configs.train import TrainConfig

Check = Callable[..., RunConfig]

CAPACITY = "model.moe.router={kind: topk, capacity: {factor: 1.0, group_tokens: %d}}"
BROKEN: dict[str, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    # rule: (overrides that break it, both values as told, overrides that keep it)
    "batch_holds_whole_sequences": (
        ("train.batch_tokens=100",),
        ("train.batch_tokens=100", "train.sequence_length=16"),
        ("train.batch_tokens=96",),
    ),
    "capacity_group_divides_sequence": (
        (CAPACITY % 5,),
        ("group_tokens=5", "train.sequence_length=16"),
        (CAPACITY % 8,),
    ),
    "experts_divide": (
        ("parallel.expert=4",),
        ("parallel.expert=4", "num_experts=6"),
        ("parallel.expert=3",),
    ),
    "sparse_blocks_fit_sequence": (
        ("model.attention.sparse={block_size: 16}", "train.sequence_length=96", "train.batch_tokens=768"),
        ("sinks + window + random = 7 blocks", "train.sequence_length=96 has 6 whole blocks of 16"),
        ("model.attention.sparse={block_size: 16}", "train.sequence_length=112", "train.batch_tokens=896"),
    ),
    "document_end_is_a_token": (
        ("model.attention.document_end=64",),
        ("model.attention.document_end=64", "model.vocab_size=64"),
        ("model.attention.document_end=63",),
    ),
    "schedule_fits_steps": (
        ("train.schedule={kind: wsd, warmup_steps: 60, decay_steps: 50}",),
        ("110 steps", "train.steps=100"),
        ("train.schedule={kind: wsd, warmup_steps: 60, decay_steps: 40}",),
    ),
    "source_names_differ": (
        ("data.sources=[{name: a, path: x}, {name: b, path: y}, {name: a, path: z}]",),
        ("'a'", "twice"),
        ("data.sources=[{name: a, path: x}, {name: b, path: x}]",),
    ),
    "tensor_divides_heads": (
        ("parallel.tensor=3",),
        ("parallel.tensor=3", "num_heads=4"),
        ("parallel.tensor=2",),
    ),
    "tensor_divides_widths": (
        ("parallel.tensor=4", "model.ffn.width=50"),
        ("parallel.tensor=4", "model.ffn.width=50", "nearest that works: parallel.tensor=2"),
        ("parallel.tensor=2", "model.ffn.width=50"),
    ),
    "tensor_divides_vocabulary": (
        ("parallel.tensor=4", "model.vocab_size=66"),
        ("parallel.tensor=4", "model.vocab_size=66", "68", "nearest that works: parallel.tensor=2"),
        ("parallel.tensor=2", "model.vocab_size=66"),
    ),
    "tensor_divides_sequence": (
        ("parallel.tensor=4", "train.sequence_length=18", "train.batch_tokens=144"),
        ("parallel.tensor=4", "train.sequence_length=18"),
        (
            "parallel={tensor: 4, sequence: false, expert_tensor: true}",
            "train.sequence_length=18",
            "train.batch_tokens=144",
        ),
    ),
    "context_divides_heads": (
        ("parallel={context: 4, tensor: 2}",),
        ("parallel.context=4 x parallel.tensor=2", "num_heads=4", "nearest that works: parallel."),
        ("parallel={context: 4, tensor: 1}", "model.attention.num_kv_heads=2"),
    ),
    "context_divides_sequence": (
        ("parallel.context=4", "train.sequence_length=18", "train.batch_tokens=144"),
        ("parallel.context=4", "train.sequence_length=18", "nearest that works: parallel.context=2"),
        ("parallel.context=2", "train.sequence_length=18", "train.batch_tokens=144"),
    ),
    "stages_have_layers": (
        ("parallel.pipeline=5",),
        ("parallel.pipeline=5", "model.num_layers=4", "nearest that works: parallel.pipeline=4"),
        ("parallel.pipeline=4",),
    ),
    "zero_0_is_float32": (
        ("parallel.zero_stage=0",),
        ("parallel.zero_stage=0", "train.precision=bf16"),
        ("parallel.zero_stage=0", "train.precision=float32"),
    ),
}


def test_every_rule_has_a_case() -> None:
    assert {rule.__name__ for rule in (*RULES, *LAYOUT_RULES)} == set(BROKEN)


@pytest.mark.parametrize("rule", BROKEN)
def test_rule_names_both_values(check: Check, rule: str) -> None:
    broken, told, kept = BROKEN[rule]
    with pytest.raises(UserError) as met:
        check(*broken)
    assert all(part in met.value.found for part in told), met.value.found
    assert isinstance(check(*kept), RunConfig)


@pytest.mark.parametrize(
    ("broken", "told", "kept"),
    [
        ("model.moe.router={kind: topk, k: 7}", ("router.k=7", "num_experts=6"), "model.moe.router={kind: topk, k: 6}"),
        ("model.moe.offset=2", ("offset=2", "every=2"), "model.moe.offset=1"),
        ("model.attention.num_kv_heads=3", ("num_kv_heads=3", "num_heads=4"), "model.attention.num_kv_heads=2"),
        (
            "model.attention={num_heads: 4, head_width: 7, position: {kind: rotary}}",
            ("head_width=7", "even"),
            "model.attention={num_heads: 4, head_width: 7}",
        ),
        (
            "model.moe.router={kind: expert_choice}",
            ("later tokens", "allow_noncausal=true"),
            "model.moe.router={kind: expert_choice, allow_noncausal: true}",
        ),
        (
            "train.schedule={kind: cosine, warmup_steps: 101}",
            ("101 steps", "train.steps=100"),
            "train.schedule={kind: inverse_sqrt, warmup_steps: 101}",  # may warm up for longer than it trains
        ),
        ("model.moe=null", ("num_experts=1", "parallel.expert=2"), "model.width=64"),
    ],
)
def test_section_rule_names_both_values(check: Check, broken: str, told: tuple[str, ...], kept: str) -> None:
    with pytest.raises(UserError) as met:
        check("parallel.expert=2", broken)
    assert all(part in met.value.found for part in told), met.value.found
    check(kept)


def test_broken_rules_are_told_together(check: Check) -> None:
    with pytest.raises(UserError) as met:
        check("parallel.expert=4", "parallel.pipeline=5", "train.batch_tokens=100")
    assert all(part in met.value.found for part in ("parallel.expert=4", "parallel.pipeline=5", "batch_tokens=100"))


@pytest.mark.parametrize(
    ("overrides", "world_size", "told"),
    [
        (("parallel.tensor=2", "parallel.pipeline=2"), 6, ("6 rank(s)", "= 4")),
        (("parallel.data=4",), 2, ("4 rank(s)", "data=4", "2 were launched")),
        (("parallel.expert=2",), 1, ("parallel.expert=2", "1 rank(s)")),
        (("parallel.expert=3",), 4, ("parallel.expert=3", "4 rank(s)")),
        (("parallel={tensor: 2, expert: 2, expert_tensor: true}",), 2, ("parallel.expert=2", "1 rank(s)", "(data)")),
        ((), 8, ("8 sequences", "8 x 2")),
        (("parallel={context: 2, tensor: 2}",), 6, ("6 rank(s)", "parallel.context x parallel.tensor", "= 4")),
        (("parallel={context: 2, expert: 3}",), 4, ("parallel.expert=3", "4 rank(s)", "(data x context x tensor)")),
        (("parallel={pipeline: 2, schedule: dualpipev}",), 4, ("needs 4 micro-batches", "holds 2")),
        (("data.heldout=[x]", "train.eval_sequences=5"), 2, ("train.eval_sequences=5", "4")),
    ],
)
def test_layout_fault_names_both_values(
    check: Check, overrides: tuple[str, ...], world_size: int, told: tuple[str, ...]
) -> None:
    found = "; ".join(layout_faults(check(*overrides), world_size))
    assert found and all(part in found for part in told), found


def test_layout_without_faults(check: Check) -> None:
    config = check("parallel.expert=2", "data.heldout=[x]", "train.eval_sequences=8")
    assert layout_faults(config, 2) == layout_faults(config, 4) == []


@pytest.mark.parametrize(
    ("overrides", "world_size", "nearest"),
    [
        (("parallel.tensor=2", "parallel.pipeline=2"), 2, "parallel.tensor=1"),
        (("parallel.expert=6",), 4, "parallel.expert=2"),
        (("parallel={context: 4, tensor: 1}",), 2, "parallel.context=2"),
        (("parallel.data=4",), 2, "parallel.data=2"),
        (("parallel={data: 2, tensor: 2, pipeline: 2, expert: 3}",), 8, "parallel.expert=2"),
        ((), 7, None),  # seven stages, heads or sequences there are not
    ],
)
def test_nearest_layout_runs_on_the_ranks_that_are_there(
    check: Check, overrides: tuple[str, ...], world_size: int, nearest: str | None
) -> None:
    config = check(*overrides)
    assert layout_faults(config, world_size)
    assert nearest_layout(config, world_size) == nearest
    if nearest:
        parallel = [f"parallel.{key}={value}".lower() for key, value in config.parallel.model_dump().items()]
        assert layout_faults(check(*parallel, *nearest.split()), world_size) == []


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.integers(1, 4096))
def test_data_degree_uses_the_ranks_that_are_there(context: int, tensor: int, pipeline: int, world_size: int) -> None:
    free = ParallelConfig(context=context, tensor=tensor, pipeline=pipeline)
    data, model_ranks = free.data_degree(world_size), context * tensor * pipeline
    assert data >= 1 and model_ranks == free.model_ranks
    assert data * model_ranks <= max(world_size, model_ranks) < (data + 1) * model_ranks
    assert free.model_copy(update={"data": 7}).data_degree(world_size) == 7


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 8), st.integers(2, 64))
def test_micro_batches_make_up_the_batch(micro_batches: int, data: int, micro: int, length: int) -> None:
    train = TrainConfig.model_validate(
        {
            "steps": 1,
            "sequence_length": length,
            "batch_tokens": length * micro * data * micro_batches,
            "micro_batch_sequences": micro,
            "optimizer": {"peak_lr": 1.0},
            "schedule": {"kind": "cosine", "warmup_steps": 0},
        }
    )
    assert train.num_micro_batches(data) == micro_batches
    assert train.batch_sequences == micro * data * micro_batches
