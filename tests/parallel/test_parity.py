"""Every layout trains like one process that runs plain PyTorch: losses, router losses and loads, the gradient of every
parameter, the global norm, the weights after three steps, a held-out loss.

Tolerance: `pretrain.parity.TOLERANCE`, with its reason there. The same gate is the user's `glam parity`.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest

from configs.run import RunConfig
from pretrain.gate import _reseeded, may_be_near_a_tie
from pretrain.local_ranks import run_ranks
from pretrain.parity import TOLERANCE, Verdict, judge, tensor_errors
from pretrain.parity_ranks import Figures, oracle, write_seed_checkpoint
from pretrain.trials import Trial, make_trials
from tests.parallel.gate_jobs import CONTEXT_LAYOUTS, FAULTS, GATE_LAYOUTS, counting_job, faulty_job, variants_job
from tests.tiny import tiny_config

STEPS = 3
# The norm is above 1 here, so clipping acts.
COMMON = (
    "model.lm_z_coef=1e-3",
    "train.clip_norm=0.5",
    "model.moe.router={kind: topk, balance_coef: 0.1, z_coef: 0.01}",
)
CAPACITY = "model.moe.router={kind: topk, capacity: {factor: 0.8}, balance_coef: 0.1, z_coef: 0.01}"
LONG = ("train.sequence_length=96", "train.batch_tokens=96", "model.attention.num_heads=4")
BLOCKS = "{block_size: 16, pattern: SSSF, layout: {kind: bigbird, window: 2, random: 2}}"
SPARSE = f"model.attention.sparse={BLOCKS}"
SUMMARIES = (
    "model.attention.position={kind: relative_bias, max_distance: 17}",
    "model.attention.sparse="
    "{block_size: 16, pattern: SSSF, layout: {kind: etc, window: 2, segment_tokens: 32, summary_tokens: 4}}",
)
DOCUMENTS = "model.attention.document_end=5"
# Models in which a fault of theirs weighs.
FAULTY: dict[str, tuple[str, ...]] = {
    "biases_of_the_first_heads": LONG,
    "blocks_of_the_first_groups": (
        *LONG,
        "model.attention.sparse={block_size: 16, layout: {kind: bigbird, sinks: 0, window: 1, random: 1}}",
    ),
    "documents_of_the_part": (*LONG, DOCUMENTS),
}
GROUPED = "model.attention={num_heads: 4, num_kv_heads: 2, head_width: 8, qk_norm: true, position: {kind: rotary}}"


@pytest.fixture(scope="session")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("seeds")


@lru_cache
def truth_of(model_json: str, train_json: str, config: RunConfig) -> Figures:
    return oracle(config, STEPS)


def truth(config: RunConfig) -> Figures:
    """The oracle, computed once for all trials of one model, batch and seed; micro-batches and layout are no part."""
    train = config.train.model_copy(update={"micro_batch_sequences": 1, "recompute": False})
    alone = tiny_config().parallel
    plain = config.model_copy(update={"train": train, "parallel": alone})
    return truth_of(config.model.model_dump_json(), train.model_dump_json(), plain)


def seed_checkpoint(config: RunConfig, folder: Path) -> str:
    path = folder / f"{hash((config.model.model_dump_json(), config.train.seed)):x}"
    if not path.exists():
        write_seed_checkpoint(config, path)
    return str(path)


def trial(layout: str, *overrides: str, sequences: int = 8) -> Trial:
    """One layout of the tiny model over 8 sequences a step."""
    degrees = dict(part.split("=") for part in layout.split(","))
    per_rank = sequences // (int(degrees.get("dp", 1)) * int(degrees.get("mb", 4)))
    heads = ("model.attention.num_heads=4",) if {"cp", "tp"} <= degrees.keys() else ()
    [made] = make_trials(tiny_config(*COMMON, *heads, *overrides), [layout], 4, full_size=True)
    batch_tokens = made.config.train.sequence_length * sequences
    train = made.config.train.model_copy(update={"micro_batch_sequences": per_rank, "batch_tokens": batch_tokens})
    return Trial(layout, made.config.model_copy(update={"train": train}), made.ranks)


def verdicts(trials: list[Trial], folder: Path) -> list[Verdict]:
    """All trials of one number of ranks, in one start of them."""
    configs = [t.config for t in trials]
    found = run_ranks(
        trials[0].ranks, variants_job, configs, [seed_checkpoint(c, folder) for c in configs], STEPS, timeout_s=300
    )
    return [
        judge(t.layout, t.config, [rank[n] for rank in found], truth(t.config), TOLERANCE) for n, t in enumerate(trials)
    ]


def assert_agree(trials: list[Trial], folder: Path) -> None:
    """As the gate decides: where a token lay so near a tie that rounding sent it elsewhere, a second seed decides."""
    departed = [(t, v) for t, v in zip(trials, verdicts(trials, folder)) if not v.agrees]
    again = [Trial(t.layout, _reseeded(t.config, 1), t.ranks) for t, v in departed if may_be_near_a_tie(t, v)]
    told = [f"{v.layout} {t.config.model.moe}: {v.departure}" for t, v in departed if not may_be_near_a_tie(t, v)]
    if again:
        told += [f"{v.layout}: {v.departure}" for v in verdicts(again, folder) if not v.agrees]
    assert not told, "\n".join(told)


@pytest.mark.parametrize("layout", (*GATE_LAYOUTS, *CONTEXT_LAYOUTS))
def test_layout_trains_as_one_process_does(layout: str, seeds: Path) -> None:
    """1 and 4 micro-batches x recompute on and off x dropless and capacity."""
    trials = [
        trial(f"{layout},mb={micro_batches},recompute={recompute}", *capacity)
        for micro_batches in (1, 4)
        for recompute in (0, 1)
        for capacity in ((), (CAPACITY,))
    ]
    assert_agree(trials, seeds)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_other_layouts_and_models(ranks: int, seeds: Path) -> None:
    untied = ("model.tied_embedding=false", "model.moe.expert.gated=true")
    dense = ("model.moe=null",)
    choice = ("model.moe.router={kind: expert_choice, allow_noncausal: true}",)
    listed = {
        1: [trial("dp=1,mb=8"), trial("dp=1,mb=1", *dense), trial("dp=1,mb=2", *untied)],
        2: [
            trial("tp=2,sp=0"), trial("tp=2,sp=0", CAPACITY), trial("tp=2,etp=1"), trial("tp=2,sp=0,etp=1"),
            trial("pp=2,schedule=dualpipev"), trial("pp=2,schedule=dualpipev,recompute=1", *untied),
            trial("tp=2", GROUPED, *untied), trial("pp=2", *untied), trial("tp=2", *dense), trial("tp=2,ep=2", *choice),
            trial("tp=2,zero=0,ep=2"), trial("pp=2,zero=0"),
        ],
        3: [trial("pp=3,mb=2"), trial("pp=3,zero=0")],
        4: [
            trial("pp=4"), trial("pp=4,mb=1", CAPACITY), trial("pp=4", *dense), trial("tp=2,dp=2,ep=4"),
            trial("tp=2,dp=2,ep=2,etp=1"), trial("tp=2,dp=2,ep=2,etp=1,sp=0,zero=0"), trial("tp=2,dp=2,ep=1,zero=0"),
            trial("tp=2,pp=2", GROUPED, *untied), trial("tp=2,pp=2,schedule=dualpipev", *untied),
            trial("dp=4,ep=2,mb=2"),
        ],
        8: [
            trial("tp=2,pp=2,dp=2,ep=4"), trial("tp=2,pp=2,dp=2,ep=2,etp=1"), trial("tp=2,pp=2,dp=2,ep=2,zero=0"),
            trial("tp=2,pp=2,dp=2,ep=2,schedule=dualpipev", CAPACITY), trial("pp=4,dp=2,ep=2"),
        ],
    }[ranks]  # fmt: skip
    assert_agree(listed, seeds)


def long(kv_heads: int) -> str:
    """Everything at once: rotary positions, grouped queries, random blocks, documents kept apart."""
    return (
        f"model.attention={{num_heads: 4, num_kv_heads: {kv_heads}, head_width: 8, qk_norm: true, "
        f"position: {{kind: rotary}}, document_end: 5, sparse: {BLOCKS}}}"
    )


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_long_sequences(ranks: int, seeds: Path) -> None:
    """Every kind of attention, with heads cut over tensor ranks, sequences over context ranks, layers over stages."""
    untied = "model.tied_embedding=false"
    choice = "model.moe.router={kind: expert_choice, allow_noncausal: true}"
    listed = {
        2: [
            trial("cp=2", *LONG, SPARSE), trial("cp=2", *LONG, *SUMMARIES), trial("cp=2", *LONG, SPARSE, DOCUMENTS),
            trial("cp=2", *LONG, long(kv_heads=2)), trial("cp=2,recompute=1", *LONG, long(kv_heads=1)),
            trial("cp=2", *LONG, choice), trial("tp=2", *LONG, SPARSE), trial("tp=2", *LONG, long(kv_heads=2)),
            trial("pp=2", *LONG, SPARSE, DOCUMENTS), trial("pp=2,schedule=dualpipev", *LONG, DOCUMENTS),
        ],
        4: [
            trial("cp=2,tp=2", *LONG, SPARSE), trial("cp=2,tp=2,sp=0", *LONG, long(kv_heads=2), untied),
            trial("cp=4", *LONG, long(kv_heads=2)), trial("cp=4,ep=4", *LONG, SPARSE, DOCUMENTS, choice),
            trial("cp=2,pp=2,schedule=dualpipev", *LONG, long(kv_heads=1)),
            trial("cp=2,tp=2,ep=4", *LONG, SPARSE, DOCUMENTS, CAPACITY),
            trial("cp=2,tp=2,etp=1,ep=2", *LONG, *SUMMARIES, CAPACITY), trial("pp=4", *LONG, SPARSE, DOCUMENTS),
        ],
        8: [trial("cp=2,tp=2,pp=2,ep=4", *LONG, *SUMMARIES), trial("cp=2,tp=2,dp=2,ep=2", *LONG, long(kv_heads=2))],
    }[ranks]  # fmt: skip
    assert_agree(listed, seeds)


def test_stages_may_hold_unequal_numbers_of_experts_and_none(seeds: Path) -> None:
    """What `pp=3` and `pp=4` above rest on: a layout in which stages differ, and one where some hold no experts."""
    from pretrain import budget

    for pipeline, counts in ((3, {1, 0}), (4, {1, 0})):
        config = trial(f"pp={pipeline},mb=4").config
        stages = budget.stages(config)
        held = [sum(config.model.is_moe(n) for n in stages.blocks(stage)) for stage in range(pipeline)]
        assert set(held) == counts and sum(held) == 2
    assert len({len(budget.stages(trial("pp=3,mb=4").config).blocks(stage)) for stage in range(3)}) == 2


@pytest.mark.parametrize(
    "layout",
    [
        "dp=1,mb=1",
        "tp=2,pp=2,ep=2,dp=2",
        "tp=2,pp=2,schedule=dualpipev",
        "pp=4",
        "tp=2,sp=0,ep=2",
        "tp=2,etp=1",
        "cp=2,tp=2,ep=2",
    ],
)
def test_bf16_layouts_agree_to_bf16(layout: str, seeds: Path) -> None:
    """bf16 products round at 2^-9; float32 masters, sums and reductions keep the rest. A token near a tie may choose
    another expert, so gradients are held to their size and direction: a wrong factor would show as 1/2 or 2."""
    made = trial(layout)
    bf16 = made.config.model_copy(update={"train": made.config.train.model_copy(update={"precision": "bf16"})})
    [found] = zip(*run_ranks(made.ranks, variants_job, [bf16], [seed_checkpoint(bf16, seeds)], STEPS))
    wanted = truth(made.config)
    for rank in found:
        assert rank.losses == pytest.approx(wanted.losses, rel=1e-2)
        assert rank.norms == pytest.approx(wanted.norms, rel=5e-2)
        assert rank.heldout == pytest.approx(wanted.heldout, rel=1e-2)
    for what, name, rank, error, ratio in tensor_errors(found, wanted):
        assert error < 0.3 and ratio == pytest.approx(1, abs=0.25), (what, name, rank, error, ratio)


# ---- the gate itself ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("fault", "layout", "what", "tensor", "ratio", "cause"),
    [
        ("experts_counted_twice", "ep=2,dp=2", "gradients", ".experts.", 2, "2 expert ranks"),
        ("norms_left_partial", "tp=2", "gradients", "_norm.scale", None, ""),
        ("routers_left_partial", "tp=2,ep=2", "gradients", ".router.weight", None, ""),
        ("balance_counted_per_micro_batch", "dp=2,mb=4", "gradients", "", None, ""),
        ("norm_without_experts", "ep=2,dp=2", "norm", "step 1", None, ""),
        ("embedding_not_tied", "pp=2", "gradients", "embed.weight", None, ""),
        ("no_clipping", "dp=2,zero=0", "loads", "step 2", None, ""),
        ("no_clipping", "dp=2", "loads", "step 2", None, ""),
        ("heads_swapped", "tp=2", "loss", "step 1", None, ""),
        ("balance_divided_by_context", "cp=2", "gradients", "", None, ""),
        ("biases_of_the_first_heads", "cp=2", "loss", "step 1", None, ""),
        ("blocks_of_the_first_groups", "cp=2", "loss", "step 1", None, ""),
        ("documents_of_the_part", "cp=2", "loss", "step 1", None, ""),
    ],
)
def test_gate_catches(
    fault: str, layout: str, what: str, tensor: str, ratio: float | None, cause: str, seeds: Path
) -> None:
    made = trial(layout, *FAULTY.get(fault, ()))
    for number in (0, 1):  # the gate counts a departure only if a second seed departs too
        config = _reseeded(made.config, number)
        found = run_ranks(made.ranks, faulty_job, config, seed_checkpoint(config, seeds), STEPS, fault)
        first = judge(layout, config, found, truth(config), TOLERANCE).departure
        assert first is not None, f"{fault} passed"
        assert (first.what, tensor in first.tensor) == (what, True), first
        assert first.error > 10 * TOLERANCE and cause in first.cause, first
        assert ratio is None or first.ratio == pytest.approx(ratio, rel=1e-3)


def test_every_planted_fault_is_tried() -> None:
    [marks] = [m for m in test_gate_catches.pytestmark if m.name == "parametrize"]  # type: ignore[attr-defined]
    assert {case[0] for case in marks.args[1]} == set(FAULTS)


# ---- no doubled work ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("schedule", ["1f1b", "dualpipev"])
@pytest.mark.parametrize("recompute", [0, 1])
def test_one_backward_pass_a_block_and_micro_batch(schedule: str, recompute: int, seeds: Path) -> None:
    made = trial(f"pp=2,mb=4,recompute={recompute},schedule={schedule}")
    found = run_ranks(2, counting_job, made.config, seed_checkpoint(made.config, seeds))
    backward = {name: n for rank in found for name, n in rank["backward"].items()}
    forward = {name: n for rank in found for name, n in rank["forward"].items()}
    assert backward == {f"block {n}": 4 for n in range(4)}
    assert forward == {f"block {n}": 4 * (1 + recompute) for n in range(4)}
