"""Stopped and resumed equals never stopped; a checkpoint of one layout can be read by another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from pretrain.checkpoint import load_weights
from pretrain.checkpoint_folders import complete_checkpoints
from pretrain.local_ranks import run_ranks
from tests.conftest import MakeData
from tests.parallel.checkpoint_jobs import begin_job, stay_job
from tests.parallel.jobs import assemble, resume_job
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


@pytest.mark.parametrize(("there", "ranks"), [("{tensor: 2, expert: 2}", 2), ("{pipeline: 2, zero_stage: 0}", 2)])
def test_a_new_run_begins_with_the_weights_of_another(
    tmp_path: Path, make_data: MakeData, there: str, ranks: int
) -> None:
    """At any layout, and with what may change changed; the optimizer starts afresh."""
    data = {"data": make_data(json=1.0)}
    here = tiny_config("parallel={expert: 2}", "model.vocab_size=512").model_copy(update=data)
    saved = run_ranks(2, stay_job, here, str(tmp_path / "old"), 2, 2)
    changed = ("model.vocab_size=512", f"parallel={there}", "model.moe.router={kind: topk, balance_coef: 0.05}")
    config = tiny_config(*changed).model_copy(update=data)
    found = run_ranks(ranks, begin_job, config, str(tmp_path / "new"), str(tmp_path / "old"))
    before, after = assemble([rank["pieces"] for rank in saved]), assemble([rank["pieces"] for rank in found])
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) if name.endswith("/weight") else not tensor.any(), name
    assert all(rank["figures"] == found[0]["figures"] for rank in found)
