"""Out to Hugging Face and in from there: the same logits under transformers, the same weights back, faults told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.errors import UserError
from configs.model import ModelConfig
from data_prep.tokenizer import Tokenizer
from model.glam import GLaM
from parallel import checkpoint_serial, checkpoint_store
from parallel.checkpoint_manifest import Manifest
from pretrain.checkpoint_checks import read_for_start
from pretrain.huggingface import export_folder, import_folder
from pretrain.weights import parameter_shapes
from tests.tiny import make_model, randomise_tables, tiny_config

MODERN: dict[str, Any] = {
    "vocab_size": 96,
    "num_layers": 4,
    "width": 64,
    "attention": {
        "num_heads": 4,
        "head_width": 32,
        "num_kv_heads": 2,
        "qk_norm": True,
        "position": {"kind": "rotary", "base": 1e6},
    },
    "ffn": {"width": 80, "activation": "silu", "gated": True},
    "moe": {
        "num_experts": 8,
        "every": 2,
        "offset": 1,
        "expert": {"width": 48, "activation": "silu", "gated": True},
        "router": {"kind": "topk", "k": 3},
    },
    "tied_embedding": False,
}


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors pass through memory in many runs of rows here too."""
    monkeypatch.setattr(checkpoint_serial, "RUN_BYTES", 3000)


def modern(moe: dict[str, Any] | None = None, dense: bool = False, **changes: Any) -> ModelConfig:
    experts = None if dense else {**MODERN["moe"], **(moe or {})}
    return ModelConfig.check({**MODERN, **changes, "moe": experts}, "test")


def save(folder: Path, model_config: ModelConfig, **document: Any) -> GLaM:
    """A checkpoint of a model that has some character, and the model."""
    model = make_model(model_config).eval()
    randomise_tables(model)
    tensors: dict[str, Tensor] = {f"{name}/weight": p.detach() for name, p in model.named_parameters()}
    tensors |= {f"{name}/exp_avg": torch.zeros_like(p) for name, p in model.named_parameters()}
    checkpoint_store.save(folder, tensors, {"config": {"model": model_config.model_dump(mode="json")}, **document})
    return model


def load(folder: Path) -> GLaM:
    """The model of a folder that `import_folder` made, by its model.yaml."""
    text = (folder / "model.yaml").read_text()
    (folder / "section.yaml").write_text("\n".join(line[2:] for line in text.split("\nmodel:\n")[1].split("\n")))
    config = ModelConfig.load(folder / "section.yaml")
    model = make_model(config, seed=9).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    checkpoint_store.load(folder, {f"{name}/weight": p.detach() for name, p in model.named_parameters()})
    return model


def logits_there(folder: Path, tokens: Tensor) -> Tensor:
    import transformers  # seconds

    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told.get(key) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    with torch.no_grad():
        logits: Tensor = model.eval()(tokens).logits
    return logits


def check_same_logits(model: GLaM, folder: Path) -> None:
    tokens = torch.randint(0, model.config.vocab_size, (2, 19), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        ours = model(tokens)
    torch.testing.assert_close(logits_there(folder, tokens), ours, rtol=1e-4, atol=1e-4)


def check_same_weights(model: GLaM, folder: Path) -> None:
    there = load(folder)
    assert there.config == model.config
    for name, parameter in there.named_parameters():
        assert torch.equal(parameter, model.get_parameter(name)), name


def router(k: int, **settings: Any) -> dict[str, Any]:
    return {"kind": "topk", "k": k, **settings}


EQUAL_HEADS = {**MODERN["attention"], "num_kv_heads": None, "position": {"kind": "rotary"}}
LAYOUTS = {
    "every second": modern(),
    "every third, from the first": modern({"every": 3, "offset": 0, "router": router(1)}),
    "all, not renormalised": modern({"every": 1, "offset": 0, "router": router(2, renormalise=False)}),
    "first of each pair, tied": modern({"every": 2, "offset": 0}, tied_embedding=True),
    "second of three, all experts": modern(
        {"every": 3, "offset": 1, "router": router(8, balance_coef=0.02)}, num_layers=5
    ),
    "dense": modern(dense=True),
    "dense, tied, a key a query": modern(dense=True, tied_embedding=True, norm_epsilon=1e-5, attention=EQUAL_HEADS),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_transformers_has_the_same_logits_and_the_way_back_the_same_weights(name: str, tmp_path: Path) -> None:
    config = LAYOUTS[name]
    model = save(tmp_path / "ours", config)
    report = export_folder(tmp_path / "ours", tmp_path / "hf", "float32")
    assert report.architecture == ("Qwen3MoeForCausalLM" if config.moe else "Qwen3ForCausalLM")
    assert report.parameters == sum(p.numel() for p in model.parameters())
    assert sorted(report.files) == sorted(path.name for path in (tmp_path / "hf").iterdir())
    assert report.bytes == sum(path.stat().st_size for path in (tmp_path / "hf").iterdir())
    check_same_logits(model, tmp_path / "hf")
    back = import_folder(tmp_path / "hf", tmp_path / "back")
    assert (back.architecture, back.dtypes, back.notes) == (report.architecture, ("F32",), ())
    check_same_weights(model, tmp_path / "back")
    read_for_start(tmp_path / "back", config, parameter_shapes(config))
    assert not list(tmp_path.glob("*.partial*"))


def test_shards_are_cut_and_indexed(tmp_path: Path) -> None:
    model = save(tmp_path / "ours", modern())
    report = export_folder(tmp_path / "ours", tmp_path / "hf", "float32", shard_bytes=100_000)
    shards = [name for name in report.files if name.startswith("model-")]
    assert shards[-1] == f"model-{len(shards):05d}-of-{len(shards):05d}.safetensors" and len(shards) > 5
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    for name in shards:
        tensors = load_file(tmp_path / "hf" / name)
        assert sum(t.nbytes for t in tensors.values()) <= 100_000
        assert {key for key, file in index["weight_map"].items() if file == name} == set(tensors)
    expert = "model.layers.1.mlp.experts.5.up_proj.weight"
    there = load_file(tmp_path / "hf" / index["weight_map"][expert])[expert]
    assert torch.equal(there, model.get_parameter("blocks.1.moe.experts.up")[5])
    check_same_logits(model, tmp_path / "hf")
    import_folder(tmp_path / "hf", tmp_path / "back")
    check_same_weights(model, tmp_path / "back")


def test_half_precision_is_rounded_once(tmp_path: Path) -> None:
    model = save(tmp_path / "ours", modern())
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        export_folder(tmp_path / "ours", tmp_path / name, name)
        there = load_file(tmp_path / name / "model.safetensors")
        assert torch.equal(there["model.embed_tokens.weight"], model.embed.weight.to(dtype))
        assert json.loads((tmp_path / name / "config.json").read_text())["torch_dtype"] == name
        assert import_folder(tmp_path / name, tmp_path / f"back {name}").dtypes == (
            "BF16" if dtype == torch.bfloat16 else "F16",
        )
        assert torch.equal(load(tmp_path / f"back {name}").embed.weight, model.embed.weight.to(dtype).float())


def test_a_value_that_a_type_cannot_hold_is_refused(tmp_path: Path) -> None:
    config = modern()
    model = make_model(config)
    model.get_parameter("blocks.3.moe.experts.down").data[7, 3, 5] = -70_000.0
    tensors = {f"{name}/weight": p.detach() for name, p in model.named_parameters()}
    checkpoint_store.save(tmp_path / "ours", tensors, {"config": {"model": config.model_dump(mode="json")}})
    with pytest.raises(UserError, match=r"blocks\.3\.moe\.experts\.down holds 70000"):
        export_folder(tmp_path / "ours", tmp_path / "hf", "float16")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    export_folder(tmp_path / "ours", tmp_path / "hf", "bfloat16")


# ---- folders that transformers wrote --------------------------------------------------------------------------------
def make_there(folder: Path, sparse: bool = True, stacked: bool = False, **changes: Any) -> Any:
    """A model of transformers with random weights, saved by itself."""
    import transformers

    settings = {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 80, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
        "initializer_range": 0.1, **changes,
    }  # fmt: skip
    if sparse:
        settings |= {
            "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True,
            "decoder_sparse_step": 2,
        }  # fmt: skip
    kind = "Qwen3Moe" if sparse else "Qwen3"
    torch.manual_seed(4)
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder, max_shard_size="100KB")
    if stacked:
        for path in folder.glob("model*"):
            path.unlink()
        tensors = {name: t.clone() for name, t in model.state_dict().items()}
        assert "model.layers.1.mlp.experts.gate_up_proj" in tensors
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stacked": True},
        {"tie_word_embeddings": True},
        {"sparse": False},
        {"sparse": False, "tie_word_embeddings": True},
        {"dtype": torch.bfloat16},
    ],
)
def test_what_transformers_saved_has_the_same_logits_here(options: dict[str, Any], tmp_path: Path) -> None:
    there = make_there(tmp_path / "hf", **options)
    report = import_folder(tmp_path / "hf", tmp_path / "ours")
    ours = load(tmp_path / "ours")
    tokens = torch.randint(0, 96, (2, 19), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), there.float()(tokens).logits, rtol=1e-4, atol=1e-4)
    assert report.parameters == sum(p.numel() for p in ours.parameters())
    document = Manifest.read(tmp_path / "ours").document
    assert document["origin"]["sources"][0]["sequence_length"] == 32768
    assert ours.config == ModelConfig.check(document["config"]["model"], "test")


def test_tied_weights_stored_twice(tmp_path: Path) -> None:
    make_there(tmp_path / "hf", sparse=False, tie_word_embeddings=True)
    add_tensor(tmp_path / "hf", "lm_head.weight", lambda t: t["model.embed_tokens.weight"].clone())
    report = import_folder(tmp_path / "hf", tmp_path / "ours")
    assert "lm_head.weight is a copy" in report.notes[0]
    add_tensor(tmp_path / "hf", "lm_head.weight", lambda t: t["model.embed_tokens.weight"] + 1)
    with pytest.raises(UserError, match=r"a lm_head\.weight other than"):
        import_folder(tmp_path / "hf", tmp_path / "other")


def add_tensor(folder: Path, name: str, make: Callable[[dict[str, Tensor]], Tensor | None]) -> None:
    """Put a tensor into a folder, or take it out; one file afterwards."""
    tensors = {key: t for path in folder.glob("model*.safetensors") for key, t in load_file(path).items()}
    made = make(tensors)
    if made is None:
        del tensors[name]
    else:
        tensors[name] = made
    for path in folder.glob("model*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


# ---- refused --------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def saved_there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sparse folder in shards; tests that break it copy it."""
    folder = tmp_path_factory.mktemp("there") / "hf"
    make_there(folder)
    return folder


@pytest.fixture
def folder(saved_there: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(saved_there, tmp_path / "hf")
    yield tmp_path / "hf"
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial*")), "a refusal leaves nothing"


def change(folder: Path, **changes: Any) -> None:
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, **changes}))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "llama"}, 'model_type="llama"'),
        ({"model_type": None}, "model_type=null"),
        ({"attention_bias": True}, "attention_bias=true"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling=.*yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "rope_scaling=.*linear"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters=.*yarn"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters="),
        ({"rope_theta": 1e4}, "rope_theta is 10000 and 500000"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"use_sliding_window": True, "sliding_window": 1024}, "sliding_window=1024"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, "layer_types="),
        ({"hidden_act": "gelu"}, 'hidden_act="gelu"'),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config=.*fp8"),
        ({"mlp_only_layers": [0, 1]}, r"lacks .* such as model\.layers\.1\.mlp\.down_proj"),
        ({"decoder_sparse_step": 1, "mlp_only_layers": [0]}, r"mlp_only_layers=\[0\].*layers 1, 2, 3 of 4"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
        ({"num_experts_per_tok": 9}, "k=9"),
        ({"vocab_size": "96"}, 'vocab_size="96"'),
        ({"norm_topk_prob": 1}, "norm_topk_prob=1"),
        ({"num_key_value_heads": 3}, "num_kv_heads=3"),
        ({"hidden_size": 32}, r"has the shape \[96, 64\]"),
        ({"moe_intermediate_size": 24}, r"has the shape \[\d+, \d+\]"),
        ({"num_local_experts": 4}, "ours has no place for, such as model.layers.1.mlp.experts.4"),
        ({"num_hidden_layers": 6}, "lacks .* such as model.layers.4"),
    ],
)
def test_config_that_ours_cannot_be(folder: Path, tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    change(folder, **changes)
    with pytest.raises(UserError, match=told) as refused:
        import_folder(folder, tmp_path / "out")
    assert str(folder) in refused.value.found and refused.value.remedy and refused.value.expected


@pytest.mark.parametrize(
    "changes",
    [
        {"use_sliding_window": False, "sliding_window": 1024},
        {"rope_theta": 5e5, "rope_scaling": None},
        {"rope_parameters": None, "rope_theta": 5e5},
        {"rope_scaling": {"type": "default"}},
        {"hidden_act": "swish"},
    ],
)
def test_config_that_only_looks_otherwise(saved_there: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    shutil.copytree(saved_there, tmp_path / "hf")
    change(tmp_path / "hf", **changes)
    import_folder(tmp_path / "hf", tmp_path / "ours")
    position = load(tmp_path / "ours").config.attention.position
    assert position.kind == "rotary" and position.base == 5e5


def break_files(folder: Path, how: str) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[3]
    if how == "missing":
        shard.unlink()
    elif how == "cut":
        shard.write_bytes(shard.read_bytes()[:-10])
    elif how == "pointer":
        shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4000000000\n")
    elif how == "no index":
        (folder / "model.safetensors.index.json").unlink()
    elif how == "bad index":
        (folder / "model.safetensors.index.json").write_text("{}")
    elif how == "outside":
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    elif how == "pickled":
        for path in folder.glob("model*"):
            path.unlink()
        (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    elif how == "lacking":
        add_tensor(folder, "model.layers.3.mlp.experts.2.up_proj.weight", lambda _: None)
    elif how == "odd":
        add_tensor(folder, "model.layers.0.self_attn.q_proj.bias", lambda _: torch.zeros(128))
    elif how == "quantised":
        add_tensor(folder, "model.norm.weight", lambda _: torch.zeros(64, dtype=torch.int8))
    elif how == "shape":
        add_tensor(folder, "model.layers.1.mlp.experts.7.down_proj.weight", lambda _: torch.zeros(48, 64))
    else:
        (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("missing", r"model-00004-of-\d+\.safetensors is missing"),
        ("cut", r"model-00004-of-\d+\.safetensors: \d+ bytes, its head announces \d+"),
        ("pointer", r"model-00004-of-\d+\.safetensors: a file of 72 bytes that announces a head of"),
        ("no index", "neither model.safetensors nor model.safetensors.index.json"),
        ("bad index", r"index\.json"),
        ("outside", r"names \.\./x\.safetensors"),
        ("pickled", "only pytorch_model.bin, a pickle"),
        ("lacking", "lacks 1 tensor.* model.layers.3.mlp.experts.2.up_proj.weight"),
        ("odd", r"no place for, such as model.layers.0.self_attn.q_proj.bias"),
        ("quantised", "model.norm.weight is of type I8"),
        ("shape", r"model.layers.1.mlp.experts.7.down_proj.weight has the shape \[48, 64\]"),
        ("config", r"config\.json: "),
    ],
)
def test_files_that_are_not_what_they_should_be(folder: Path, tmp_path: Path, how: str, told: str) -> None:
    break_files(folder, how)
    with pytest.raises(UserError, match=told):
        import_folder(folder, tmp_path / "out")


def test_nothing_is_overwritten(saved_there: Path, tmp_path: Path) -> None:
    save(tmp_path / "ours", modern())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    for attempt in (
        lambda: export_folder(tmp_path / "ours", tmp_path / "out"),
        lambda: import_folder(saved_there, tmp_path / "out"),
    ):
        with pytest.raises(UserError, match="out exists"):
            attempt()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


def test_sources_that_cannot_be_exported(tmp_path: Path) -> None:
    save(tmp_path / "ours", modern())
    with pytest.raises(UserError, match="dtype=int8"):
        export_folder(tmp_path / "ours", tmp_path / "out", "int8")
    with pytest.raises(UserError, match="is no folder"):
        export_folder(tmp_path / "absent", tmp_path / "out")
    with pytest.raises(UserError, match="is no folder"):
        import_folder(tmp_path / "absent", tmp_path / "out")
    manifest = Manifest.read(tmp_path / "ours")
    box = manifest.tensors["embed.weight/weight"].boxes[0]
    with (tmp_path / "ours" / manifest.files[box.file].name).open("r+b") as file:
        file.seek(box.start + 5)
        file.write(b"\x55\xaa")
    with pytest.raises(UserError, match=r"damaged: .*embed\.weight/weight"):
        export_folder(tmp_path / "ours", tmp_path / "out")
    other = modern(num_layers=5)
    model = make_model(modern())
    tensors = {f"{name}/weight": p.detach() for name, p in model.named_parameters()}
    checkpoint_store.save(tmp_path / "lies", tensors, {"config": {"model": other.model_dump(mode="json")}})
    with pytest.raises(UserError, match=r"holds nothing for blocks\.4"):
        export_folder(tmp_path / "lies", tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.partial*"))


# ---- models that only this program has ------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("override", "setting"),
    [
        ([], "attention.position.kind=relative_bias"),
        ([], "moe.expert.activation=relu"),
        ([], "moe.expert.gated=false"),
        ([], "ffn.activation=gelu"),
        ([], "attention.qk_norm=false"),
        (["model.moe.router.capacity={factor: 1.25}"], "moe.router.capacity.factor=1.25"),
        (["model.moe.router={kind: noisy_topk}"], "moe.router.kind=noisy_topk"),
    ],
)
def test_a_model_without_a_stock_architecture(override: list[str], setting: str, tmp_path: Path) -> None:
    model = save(tmp_path / "ours", tiny_config(*override).model)
    report = export_folder(tmp_path / "ours", tmp_path / "hf", "float32")
    assert report.architecture == "GLaM" and setting in report.notes[0]
    readme = (tmp_path / "hf" / "README.md").read_text()
    assert setting in readme and "from_pretrained" not in readme
    tree = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert tree["architectures"] == ["GLaM"] and ModelConfig.check(tree["model"], "test") == model.config
    with safe_open(tmp_path / "hf" / "model.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor("blocks.0.moe.experts.up"), model.get_parameter("blocks.0.moe.experts.up"))
    import_folder(tmp_path / "hf", tmp_path / "back")
    check_same_weights(model, tmp_path / "back")


# ---- tokenizers -----------------------------------------------------------------------------------------------------
def save_run(run: Path, corpus: Path, **changes: Any) -> GLaM:
    """What a run over the corpus leaves, as far as export looks at it."""
    config = modern(vocab_size=512)
    document = {
        "config": {
            "name": "small",
            "model": config.model_dump(mode="json"),
            "data": {"sources": [{"name": "json", "path": str(corpus / "train" / "json")}]},
            "train": {"sequence_length": 256},
        },
        "tokenizers": {"json": Tokenizer(corpus / "tokenizer").sha256},
        "state": {"step": 7, "tokens": 1234},
        **changes,
    }
    return save(run / "checkpoints" / "step-00000007", config, **document)


def test_a_run_is_exported_with_its_tokenizer(tmp_path: Path, corpus: Path) -> None:
    import transformers

    model = save_run(tmp_path / "run", corpus)
    report = export_folder(tmp_path / "run", tmp_path / "hf", "float32")
    assert report.notes == ()
    ours, theirs = Tokenizer(corpus / "tokenizer"), transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = Path(json.__file__).read_text(encoding="utf-8") + " \u2581 é\n\n\t  </s>"
    assert theirs(text)["input_ids"] == ours.encode(text).tolist()
    assert theirs.decode(theirs(text)["input_ids"]) == text
    config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
    assert (config.eos_token_id, config.max_position_embeddings) == (ours.eos_id, 256)
    check_same_logits(model, tmp_path / "hf")
    there = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    said = there.generate(**theirs("def main(", return_tensors="pt"), max_new_tokens=5, do_sample=False)
    assert said.shape[1] > len(ours.encode("def main("))
    readme = (tmp_path / "hf" / "README.md").read_text()
    assert "name small, step 7, tokens 1234" in readme and "AutoTokenizer" in readme
    # The tokenizer's files go along on the way back, and out again.
    import_folder(tmp_path / "hf", tmp_path / "back")
    again = export_folder(tmp_path / "back", tmp_path / "again", "float32")
    assert again.notes == ()
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == (tmp_path / "hf" / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "again" / "config.json").read_text())["max_position_embeddings"] == 256


def test_without_a_tokenizer_a_note_says_so(tmp_path: Path, corpus: Path) -> None:
    save_run(tmp_path / "run", corpus, config={"model": modern(vocab_size=512).model_dump(mode="json")})
    report = export_folder(tmp_path / "run", tmp_path / "hf")
    told = " ".join(report.notes)
    assert "no tokenizer: the checkpoint does not say where its data lies" in told and "--tokenizer" in told
    assert "max_position_embeddings=32768 is a guess" in told
    readme = (tmp_path / "hf" / "README.md").read_text()
    assert all(note in readme for note in report.notes) and "AutoTokenizer.from" not in readme
    assert not list((tmp_path / "hf").glob("tokenizer*"))
    report = export_folder(tmp_path / "run", tmp_path / "named", tokenizer=corpus / "tokenizer")
    assert "tokenizer.json" in report.files and "no tokenizer" not in " ".join(report.notes)


def test_another_tokenizer_than_the_datas_is_refused(tmp_path: Path, corpus: Path) -> None:
    save_run(tmp_path / "run", corpus, tokenizers={"json": "0" * 64})
    report = export_folder(tmp_path / "run", tmp_path / "hf")
    assert "did not make the data of" in report.notes[0] and "tokenizer.json" not in report.files
    with pytest.raises(UserError, match="did not make the data"):
        export_folder(tmp_path / "run", tmp_path / "named", tokenizer=corpus / "tokenizer")
    save(tmp_path / "small", modern())
    with pytest.raises(UserError, match="512 entries, the model's vocabulary 96"):
        export_folder(tmp_path / "small", tmp_path / "named", tokenizer=corpus / "tokenizer")
    assert not (tmp_path / "named").exists()
