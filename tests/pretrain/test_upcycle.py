"""A mixture made of a dense model begins as that model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from configs.model import ModelConfig
from model.glam import GLaM
from model.init import initial_value
from parallel import checkpoint_serial, checkpoint_store
from parallel.checkpoint_manifest import Manifest
from pretrain.checkpoint_checks import read_for_start
from pretrain.huggingface import export_folder
from pretrain.upcycle import UpcycleReport, upcycle
from tests.tiny import make_model, randomise_tables, tiny_config

GLAM = tiny_config("model.moe=null").model
MODERN = tiny_config(
    "model.moe=null",
    "model.ffn={width: 48, activation: silu, gated: true}",
    "model.attention={num_heads: 2, head_width: 24, qk_norm: true, position: {kind: rotary}}",
    "model.tied_embedding=false",
).model
PLAIN = tiny_config("model.moe=null", "model.ffn={width: 40, activation: relu, gated: false}").model


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stack of experts passes through memory in many runs here too."""
    monkeypatch.setattr(checkpoint_serial, "RUN_BYTES", 20_000)


def save(folder: Path, config: ModelConfig) -> GLaM:
    model = make_model(config).eval()
    randomise_tables(model)
    tensors = {f"{name}/weight": p.detach() for name, p in model.named_parameters()}
    document = {"config": {"model": config.model_dump(mode="json")}, "tokenizers": {"a": "f" * 64}}
    checkpoint_store.save(folder, tensors, {**document, "state": {"step": 5}})
    return model


def load(folder: Path) -> GLaM:
    """The model of a folder, by its model.yaml."""
    lines = (folder / "model.yaml").read_text().split("\nmodel:\n")[1].split("\n")
    section = folder.parent / "section.yaml"
    section.write_text("\n".join(line[2:] for line in lines))
    model = make_model(ModelConfig.load(section), seed=9).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    checkpoint_store.load(folder, {f"{name}/weight": p.detach() for name, p in model.named_parameters()})
    return model


def logits(model: GLaM) -> Tensor:
    tokens = torch.randint(0, model.config.vocab_size, (3, 16), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        out: Tensor = model(tokens)
    return out


@pytest.mark.parametrize("config", [GLAM, MODERN, PLAIN], ids=["glam", "modern", "plain"])
@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"num_experts": 4}, (0, 2)),
        ({"num_experts": 2, "k": 1, "every": 1}, (0, 1, 2, 3)),
        ({"num_experts": 5, "k": 5, "every": 3, "offset": 1}, (1,)),
    ],
)
def test_first_logits_are_those_of_the_dense_model(
    config: ModelConfig, options: dict[str, Any], layers: tuple[int, ...], tmp_path: Path
) -> None:
    dense = save(tmp_path / "dense", config)
    report = upcycle(tmp_path / "dense", tmp_path / "sparse", **options)
    sparse = load(tmp_path / "sparse")
    torch.testing.assert_close(logits(sparse), logits(dense), rtol=1e-5, atol=1e-5)
    assert tuple(sparse.moe_blocks()) == layers
    assert report == UpcycleReport(
        folder=tmp_path / "sparse",
        layers=layers,
        parameters_before=sum(p.numel() for p in dense.parameters()),
        parameters=sum(p.numel() for p in sparse.parameters()),
        active=report.active,
    )
    k, E = options.get("k", 2), options["num_experts"]
    experts = sum(p.numel() for name, p in sparse.named_parameters() if ".experts." in name)
    assert report.active == report.parameters - experts + experts * k // E
    for name, parameter in sparse.named_parameters():
        if ".router." not in name:
            assert parameter.dtype == torch.float32 and torch.isfinite(parameter).all(), name


def test_each_expert_is_a_copy_and_routers_follow_the_seed(tmp_path: Path) -> None:
    dense = save(tmp_path / "dense", MODERN)
    upcycle(tmp_path / "dense", tmp_path / "sparse", 4, seed=3)
    sparse = load(tmp_path / "sparse")
    there = {"gate": "gate_proj", "up": "in_proj", "down": "out_proj"}
    for part, old in there.items():
        for expert in sparse.get_parameter(f"blocks.2.moe.experts.{part}"):
            assert torch.equal(expert, dense.get_parameter(f"blocks.2.ffn.{old}.weight"))
    name = "blocks.2.moe.router.weight"
    assert torch.equal(sparse.get_parameter(name), initial_value(name, (4, 32), sparse.config, seed=3))
    upcycle(tmp_path / "dense", tmp_path / "other", 4, seed=4)
    assert not torch.equal(load(tmp_path / "other").get_parameter(name), sparse.get_parameter(name))


def test_a_run_can_begin_from_it(tmp_path: Path) -> None:
    save(tmp_path / "dense", GLAM)
    upcycle(tmp_path / "dense", tmp_path / "sparse", 4)
    sparse = load(tmp_path / "sparse")
    manifest = read_for_start(tmp_path / "sparse", sparse.config, [name for name, _ in sparse.named_parameters()])
    assert all(name.endswith("/weight") for name in manifest.tensors)
    source = manifest.document["origin"]["sources"][0]
    assert (source["checkpoint"], source["step"], source["k"]) == (str(tmp_path / "dense"), 5, 2)
    assert manifest.document["tokenizers"] == {"a": "f" * 64}
    section = (tmp_path / "sparse" / "model.yaml").read_text()
    assert f"train.start_from={tmp_path / 'sparse'}" in section


def test_an_upcycled_model_can_be_exported(tmp_path: Path) -> None:
    save(tmp_path / "dense", MODERN)
    upcycle(tmp_path / "dense", tmp_path / "sparse", 4)
    assert export_folder(tmp_path / "sparse", tmp_path / "hf").architecture == "Qwen3MoeForCausalLM"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"num_experts": 1, "k": 1}, r"1 expert\(s\) a layer"),
        ({"num_experts": 0}, r"0 expert\(s\) a layer"),
        ({"num_experts": 4, "k": 5}, "router.k=5 exceeds num_experts=4"),
        ({"num_experts": 4, "k": 0}, "k: .*greater than or equal to 1"),
        ({"num_experts": 4, "every": 0}, "every: .*greater than or equal to 1"),
        ({"num_experts": 4, "every": 2, "offset": 2}, "offset=2 must be below every=2"),
        ({"num_experts": 4, "offset": -1}, "offset: .*greater than or equal to 0"),
        ({"num_experts": 4, "every": 9, "offset": 4}, "every=9, offset=4 in a model of 4 layers"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(options: dict[str, Any], told: str, tmp_path: Path) -> None:
    save(tmp_path / "dense", GLAM)
    with pytest.raises(UserError, match=told):
        upcycle(tmp_path / "dense", tmp_path / "sparse", **options)
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_checkpoints_that_cannot_be_upcycled(tmp_path: Path) -> None:
    save(tmp_path / "moe", tiny_config().model)
    with pytest.raises(UserError, match="4 experts in 2 of its layers already"):
        upcycle(tmp_path / "moe", tmp_path / "out", 4)
    save(tmp_path / "dense", GLAM)
    manifest = Manifest.read(tmp_path / "dense")
    box = manifest.tensors["blocks.1.ffn.in_proj.weight/weight"].boxes[0]
    with (tmp_path / "dense" / manifest.files[box.file].name).open("r+b") as file:
        file.seek(box.start)
        file.write(b"\x11\x22\x33\x44")
    with pytest.raises(UserError, match=r"damaged: .*blocks\.1\.ffn\.in_proj\.weight"):
        upcycle(tmp_path / "dense", tmp_path / "out", 4)
    with pytest.raises(UserError, match="moe exists"):
        upcycle(tmp_path / "dense", tmp_path / "moe", 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "moe"]
