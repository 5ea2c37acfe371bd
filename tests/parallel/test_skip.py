"""A step that is not finite on one rank is skipped on all, and leaves no trace."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.local_ranks import run_ranks
from tests.parallel.jobs import assemble, poison_job
from tests.tiny import tiny_config

SPREAD = "{tensor: 2, pipeline: 2, expert: 2}"


@pytest.mark.parametrize(
    ("ranks", "parallel", "bad_rank", "where", "precision"),
    [
        *((2, "{expert: 2}", 1, where, "float32") for where in ("loss", "dense gradient", "expert gradient")),
        *((2, "{expert: 2}", 1, where, "bf16") for where in ("loss", "dense gradient", "expert gradient")),
        (8, SPREAD, 7, "loss", "float32"),  # last stage
        (8, SPREAD, 1, "expert gradient", "bf16"),  # first stage
        (8, SPREAD, 2, "dense gradient", "float32"),
        (2, "{tensor: 2, zero_stage: 0}", 1, "dense gradient", "float32"),
        (2, "{pipeline: 2, schedule: dualpipev}", 0, "loss", "bf16"),
        (4, "{pipeline: 4}", 3, "loss", "bf16"),  # stages without experts
    ],
)  # fmt: skip
def test_poisoned_step_is_skipped_on_all_ranks(
    ranks: int, parallel: str, bad_rank: int, where: str, precision: str
) -> None:
    config = tiny_config(f"parallel={parallel}", f"train.precision={precision}", "train.micro_batch_sequences=1")
    poisoned = run_ranks(ranks, poison_job, config, bad_rank, where)
    for rank in poisoned:
        bad, good = rank["results"]
        assert not bad.applied and good.applied
        assert not (math.isfinite(bad.cross_entropy) and math.isfinite(bad.grad_norm))
    before, after = (assemble([rank[key] for rank in poisoned]) for key in ("before", "after"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    # And the next step is that of a run that never met the bad batch, to the bit.
    clean = assemble([rank["last"] for rank in run_ranks(ranks, poison_job, config, None, where)])
    last = assemble([rank["last"] for rank in poisoned])
    assert all(torch.equal(last[name], clean[name]) for name in clean)
