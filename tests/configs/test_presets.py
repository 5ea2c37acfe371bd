"""The shipped YAML files, held against the papers' tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.base import Strict
from configs.corpus import CorpusConfig
from configs.run import PRESETS, RunConfig
from pretrain.budget import parameters

FILES = sorted(path.name for path in PRESETS.glob("*.yaml"))
RUNS = [name for name in FILES if not name.startswith("corpus")]


def preset(name: str, *overrides: str) -> RunConfig:
    return RunConfig.load(PRESETS / f"{name}.yaml", overrides)


@pytest.mark.parametrize("file", FILES)
def test_preset_loads_and_survives_a_round_trip(file: str, tmp_path: Path) -> None:
    kind: type[Strict] = RunConfig if file in RUNS else CorpusConfig
    config = kind.load(PRESETS / file)
    (tmp_path / file).write_text(config.dump())
    assert kind.load(tmp_path / file) == config


@pytest.mark.parametrize("file", FILES)
def test_preset_says_what_it_is(file: str) -> None:
    first, *rest = (PRESETS / file).read_text(encoding="utf-8").splitlines()
    assert first.startswith("# ") and rest[0].startswith("# ")


@pytest.mark.parametrize("file", RUNS)
def test_preset_head_states_its_own_counts(file: str) -> None:
    """The comment's figures are what `glam plan` would say today."""
    text = (PRESETS / file).read_text(encoding="utf-8")
    counts = parameters(RunConfig.load(PRESETS / file).model)
    if "glam plan:" in text:
        assert f"{counts.total:,} parameters, {counts.active:,} active" in text
    else:
        assert file == "demo.yaml", "only the demo's cost is of no interest"


@pytest.mark.parametrize("file", RUNS)
def test_preset_run_folder_bears_its_name(file: str) -> None:
    config = RunConfig.load(PRESETS / file)
    assert config.name == Path(file).stem and config.run_dir == f"runs/{config.name}"


def test_names_and_folders_are_unique() -> None:
    assert len({RunConfig.load(PRESETS / file).run_dir for file in RUNS}) == len(RUNS)


# GLaM, arXiv:2112.06905, table 4: layers, width, ffn width, heads, head width, experts; and the vocabulary it was
# counted with.
TABLE = {
    "glam_0.1b_64e": (12, 768, 3072, 12, 64, 64, 32_000),
    "glam_1.7b_64e": (24, 2048, 8192, 16, 128, 64, 32_000),
    "glam_8b_64e": (32, 4096, 16384, 32, 128, 64, 32_000),
    "glam": (64, 8192, 32768, 128, 128, 64, 256_000),
}


@pytest.mark.parametrize("name", TABLE)
def test_row_of_the_paper(name: str) -> None:
    m = preset(name).model
    layers, width, ffn, heads, head_width, experts, vocab = TABLE[name]
    assert (m.num_layers, m.width, m.ffn.width) == (layers, width, ffn)
    assert (m.attention.num_heads, m.attention.kv_heads, m.attention.head_width) == (heads, heads, head_width)
    assert m.moe is not None and m.moe.num_experts == experts and m.vocab_size == vocab


@pytest.mark.parametrize("name", TABLE)
def test_architecture_of_the_paper(name: str) -> None:
    """Gated GELU in dense layers but plain ReLU experts, in the first of each pair; top-2, renormalised, dropless."""
    m = preset(name).model
    assert m.moe is not None
    assert (m.ffn.gated, m.ffn.activation) == (True, "gelu")
    assert (m.moe.expert.gated, m.moe.expert.activation, m.moe.expert.width) == (False, "relu", m.ffn.width)
    assert [layer for layer in range(6) if m.is_moe(layer)] == [0, 2, 4]
    assert m.num_moe_layers == m.num_layers // 2
    router = m.moe.router
    assert router.kind == "topk" and router.k == 2 and router.renormalise and router.capacity is None
    assert (router.balance_coef, m.lm_z_coef, m.tied_embedding) == (0.01, 1e-4, True)
    position = m.attention.position
    assert position.kind == "relative_bias" and (position.num_buckets, position.max_distance) == (32, 128)


@pytest.mark.parametrize("name", [*TABLE, "modern"])
def test_mixture_of_the_paper(name: str) -> None:
    weights = {source.name: source.weight for source in preset(name).data.sources}
    assert weights == {
        "web": 0.42, "wikipedia": 0.06, "conversations": 0.28, "forums": 0.02, "books": 0.20, "news": 0.02,
    }  # fmt: skip
    assert sum(weights.values()) == pytest.approx(1)


def test_largest_row_to_the_last_digit() -> None:
    p = parameters(preset("glam").model)
    assert (p.total, p.active) == (1_161_756_418_048, 96_604_528_640)
    billions = {
        "attention": p.attention, "dense_ffn": p.dense_ffn, "two experts": p.active_experts, "router": p.router,
        "embedding": p.embedding,
    }  # fmt: skip
    assert {name: f"{count / 1e9:.3f}" for name, count in billions.items()} == {
        "attention": "34.360", "dense_ffn": "25.770", "two experts": "34.360", "router": "0.017", "embedding": "2.097",
    }  # fmt: skip


def test_gated_experts_would_not_be_glam() -> None:
    gated = preset("glam", "model.moe.expert.gated=true")
    assert parameters(gated.model).total // 10**9 == 1_711


def test_dense_137b_to_the_last_digit() -> None:
    """The largest dense row: the sparse row's shape with twice the ffn, counted with 32,000 entries."""
    changes = ("model.moe=null", "parallel.expert=1", "model.ffn.width=65536", "model.vocab_size=32000")
    m = preset("glam", *changes).model
    assert (m.num_layers, m.width, m.attention.num_heads, m.attention.head_width) == (64, 8192, 128, 128)
    p = parameters(m)
    assert p.total == p.active == 137_702_416_384


def experts(count: int) -> tuple[str, str]:
    return f"model.moe.num_experts={count}", "parallel.expert=1"


DENSE = ("model.moe=null", "parallel.expert=1")


@pytest.mark.parametrize(
    ("name", "overrides", "total", "active"),
    [
        # Counts in 1e9 to the digits the table gives; None: the table does not say, or its own figure is off.
        ("glam_0.1b_64e", (), "1.9076", None),
        ("glam_1.7b_64e", (), "26.84", "1.8792"),
        ("glam_1.7b_64e", experts(32), "13.96", None),
        ("glam_1.7b_64e", experts(128), "52.62", "1.8807"),
        ("glam_8b_64e", DENSE, "8.721", "8.721"),
        ("glam_8b_64e", (), "142.94", "9.799"),
    ],
)
def test_counts_of_the_smaller_rows(name: str, overrides: tuple[str, ...], total: str, active: str | None) -> None:
    p = parameters(preset(name, *overrides).model)
    assert f"{p.total / 1e9:.{len(total.split('.')[1])}f}" == total
    if active is not None:
        assert f"{p.active / 1e9:.{len(active.split('.')[1])}f}" == active


@pytest.mark.parametrize("name", TABLE)
def test_dense_twin_is_smaller_by_what_the_second_expert_costs(name: str) -> None:
    """Width 7/6 of the ffn makes a twin of equal active parameters: 3 F' L = (3 F + 2 k F) L / 2, up to the router."""
    sparse = preset(name)
    m, p = sparse.model, parameters(sparse.model)
    twin = parameters(preset(name, *DENSE).model)
    tensor = sparse.parallel.tensor  # which the width stays a multiple of
    wide = parameters(preset(name, *DENSE, f"model.ffn.width={m.ffn.width * 7 // 6 // tensor * tensor}").model)
    assert twin.total < p.active
    assert abs(wide.total - (p.active - p.router)) <= 3 * m.width * m.num_layers * tensor
