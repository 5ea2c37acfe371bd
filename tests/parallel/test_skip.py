"""A step that is not finite on one rank is skipped on all, and leaves no trace."""

from __future__ import annotations

import math

import pytest
import torch

from pretrain.local_ranks import run_ranks
from tests.parallel.jobs import assemble, poison_job
from tests.tiny import tiny_config


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("where", ["loss", "dense gradient", "expert gradient"])
def test_poisoned_step_is_skipped_on_all_ranks(precision: str, where: str) -> None:
    config = tiny_config("parallel.expert=2", f"train.precision={precision}")
    poisoned = run_ranks(2, poison_job, config, 1, where)
    for rank in poisoned:
        bad, good = rank["results"]
        assert not bad.applied and good.applied
        assert not (math.isfinite(bad.cross_entropy) and math.isfinite(bad.grad_norm))
    before, after = (assemble([rank[key] for rank in poisoned]) for key in ("before", "after"))
    assert all(torch.equal(before[name], after[name]) for name in before)
    # And the next step is that of a run that never met the bad batch, to the bit.
    clean = assemble([rank["last"] for rank in run_ranks(2, poison_job, config, None, where)])
    last = assemble([rank["last"] for rank in poisoned])
    assert all(torch.equal(last[name], clean[name]) for name in clean)
