"""Held-out evaluation on one process: the loss and its quarters against a direct computation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from configs.errors import UserError
from pretrain.build import refuse_kernel_without_gpu
from pretrain.data import HeldOut
from pretrain.evaluate import evaluate_alone
from tests.tiny import make_model, tiny_config


@pytest.mark.parametrize("length", [64, 70])
@pytest.mark.parametrize("document_end", ["null", "1"])
def test_loss_and_quarters(corpus: Path, length: int, document_end: str) -> None:
    config = tiny_config("model.vocab_size=512", f"model.attention.document_end={document_end}")
    model, heldout = make_model(config.model), HeldOut([str(corpus / "heldout/json")], length, 6)
    found = evaluate_alone(model, heldout, None, micro_batch=2)
    windows = torch.from_numpy(heldout.read())
    with torch.no_grad():
        logits_BSV = model(windows[:, :-1])
    loss_BS = F.cross_entropy(logits_BSV.transpose(1, 2), windows[:, 1:], reduction="none")
    assert found.loss == pytest.approx(float(loss_BS.mean()), rel=1e-5)
    quarters = [float(part.mean()) for part in loss_BS.tensor_split(4, dim=1)]
    assert found.quarters == pytest.approx(quarters, rel=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_a_kernel_for_gpus_is_refused_before_anything_starts() -> None:
    long = ("train.sequence_length=512", "train.batch_tokens=1024")
    with pytest.raises(UserError, match="no GPU is here"):
        refuse_kernel_without_gpu(tiny_config("model.attention.sparse={kernel: flex}", *long))
    refuse_kernel_without_gpu(tiny_config("model.attention.sparse={kernel: chunked}", *long))
