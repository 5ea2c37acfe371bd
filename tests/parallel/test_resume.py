"""Stopped and resumed equals never stopped; a checkpoint of one layout can be read by another."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from parallel import checkpoint_store as store
from pretrain.checkpoint import complete_checkpoints, load_weights
from pretrain.local_ranks import run_ranks
from tests.parallel.jobs import assemble, resume_job, store_job
from tests.tiny import make_model, tiny_config


@pytest.mark.parametrize(
    ("precision", "router"),
    [("float32", "{kind: topk}"), ("bf16", "{kind: topk}"), ("float32", "{kind: noisy_topk}")],
)
@pytest.mark.parametrize("stop_at", [1, 3])
def test_resumed_run_is_bit_identical(tmp_path: Path, precision: str, router: str, stop_at: int) -> None:
    config = tiny_config("parallel.expert=2", f"train.precision={precision}", f"model.moe.router={router}")
    whole = run_ranks(2, resume_job, config, str(tmp_path / "whole"), 5, 5)
    first = run_ranks(2, resume_job, config, str(tmp_path / "parts"), stop_at, 5)
    second = run_ranks(2, resume_job, config, str(tmp_path / "parts"), stop_at, 5)
    for rank in range(2):
        assert first[rank]["figures"] + second[rank]["figures"] == whole[rank]["figures"]
        for name, weight in whole[rank]["weights"].items():
            assert torch.equal(second[rank]["weights"][name], weight), name
        for name, (_, boxes) in whole[rank]["pieces"].items():
            for (_, wanted), (_, found) in zip(boxes, second[rank]["pieces"][name][1]):
                assert torch.equal(found, wanted), name


@pytest.mark.parametrize(("ranks", "expert"), [(1, 1), (2, 1), (4, 4), (4, 2)])
def test_checkpoint_is_read_at_other_layouts(tmp_path: Path, ranks: int, expert: int) -> None:
    """Saved at data 2, expert 2; what another layout holds after loading is the same to the bit."""
    config = tiny_config("parallel.expert=2")
    saved = run_ranks(2, resume_job, config, str(tmp_path), 2, 5)
    other = tiny_config(f"parallel.expert={expert}")
    loaded = run_ranks(ranks, resume_job, other, str(tmp_path), 2, 2)  # steps=2: load only
    before, after = assemble([rank["pieces"] for rank in saved]), assemble([rank["pieces"] for rank in loaded])
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_weights_load_into_a_plain_model(tmp_path: Path) -> None:
    config = tiny_config("parallel.expert=2")
    saved = run_ranks(2, resume_job, config, str(tmp_path), 2, 5)
    model = make_model(config.model, seed=9)
    load_weights(complete_checkpoints(tmp_path)[-1], model, config.model)
    whole = assemble([rank["pieces"] for rank in saved])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, whole[f"{name}/weight"]), name


def test_store_writes_each_box_once_and_nothing_that_executes(tmp_path: Path) -> None:
    run_ranks(3, store_job, str(tmp_path / "c"))
    folder = tmp_path / "c"
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}  # DCP's own metadata is a pickle
    assert len(list(folder.glob("rank-*.safetensors"))) == 3
    target = {"cut": torch.zeros(7, 5, 3), "same": torch.zeros(4, dtype=torch.int64), "own/2": torch.zeros(2)}
    store.load(folder, target)
    assert torch.equal(target["cut"], torch.arange(105.0).view(7, 5, 3))
    assert torch.equal(target["same"], torch.arange(4)) and torch.equal(target["own/2"], torch.full((2,), 2.0))
    assert store.Manifest.read(folder).document == {"step": 3}
    stored = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    assert stored < 105 * 4 + 4 * 8 + 3 * 8 + 3 * 4096  # replicated "same" once; headers


def test_damage_is_found(tmp_path: Path) -> None:
    run_ranks(2, store_job, str(tmp_path / "c"))
    folder = tmp_path / "c"
    file = sorted(folder.glob("*.safetensors"))[1]
    sound = file.read_bytes()
    file.write_bytes(sound[:-3] + bytes([sound[-3] ^ 1]) + sound[-2:])
    with pytest.raises(UserError, match=r"rank-00001-000\.safetensors"):
        store.verify(folder)
    file.write_bytes(sound[:-1])
    with pytest.raises(UserError, match=f"{len(sound) - 1} bytes"):
        store.Manifest.read(folder)
    file.unlink()
    with pytest.raises(UserError, match="missing"):
        store.Manifest.read(folder)


@pytest.mark.parametrize("text", ["", "[1, 2]", json.dumps({"format": 99}), '{"format": 1}', "\x80\x04"])
def test_foreign_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / store.MANIFEST).write_text(text)
    with pytest.raises(UserError):
        store.Manifest.read(tmp_path)
