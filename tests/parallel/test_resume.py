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

SPREAD = "{tensor: 2, pipeline: 2, expert: 2}"
CASES = [
    *((2, "{expert: 2}", "float32", router, n) for n in (1, 3) for router in ("topk", "noisy_topk")),
    *((2, "{expert: 2}", "bf16", "topk", n) for n in (1, 3)),
    (8, SPREAD, "float32", "topk", 2),
    (8, SPREAD, "bf16", "noisy_topk", 3),
    (4, "{tensor: 2, pipeline: 2, expert: 1, sequence: false}", "bf16", "topk", 2),
    (2, "{expert: 2, zero_stage: 0}", "float32", "topk", 2),
    (4, "{tensor: 2, pipeline: 2, schedule: dualpipev}", "bf16", "topk", 2),
    (3, "{pipeline: 1, expert: 1}", "float32", "topk", 2),
    (6, "{pipeline: 2, data: 3}", "float32", "topk", 2),  # three copies of a tied embedding's gradient
    (4, "{tensor: 2, expert: 2, expert_tensor: true}", "float32", "topk", 2),
    (4, "{pipeline: 4}", "bf16", "topk", 2),  # stages without experts
]  # fmt: skip


@pytest.mark.parametrize(("ranks", "parallel", "precision", "router", "stop_at"), CASES)
def test_resumed_run_is_bit_identical(
    tmp_path: Path, ranks: int, parallel: str, precision: str, router: str, stop_at: int
) -> None:
    tokens = 16 * 12  # twelve sequences divide by three data ranks too
    config = tiny_config(
        f"parallel={parallel}", f"train.precision={precision}", f"model.moe.router={{kind: {router}}}",
        f"train.batch_tokens={tokens}", "train.micro_batch_sequences=1",
    )  # fmt: skip
    whole = run_ranks(ranks, resume_job, config, str(tmp_path / "whole"), 5, 5)
    first = run_ranks(ranks, resume_job, config, str(tmp_path / "parts"), stop_at, 5)
    second = run_ranks(ranks, resume_job, config, str(tmp_path / "parts"), stop_at, 5)
    for rank in range(ranks):
        assert first[rank]["figures"] + second[rank]["figures"] == whole[rank]["figures"]
        for name, weight in whole[rank]["weights"].items():
            assert torch.equal(second[rank]["weights"][name], weight), name
        for name, (_, boxes) in whole[rank]["pieces"].items():
            for (_, wanted), (_, found) in zip(boxes, second[rank]["pieces"][name][1]):
                assert torch.equal(found, wanted), name
    assert whole[0]["evaluated"] == second[-1]["evaluated"]
    # What `glam generate` and `glam eval` do with it: the whole model on one process, whatever the layout.
    model = make_model(config.model, seed=9)
    load_weights(complete_checkpoints(tmp_path / "parts")[-1], model, config.model)
    held = assemble([rank["pieces"] for rank in first])
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, held[f"{name}/weight"]), name


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
