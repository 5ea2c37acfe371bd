"""Held-out evaluation: nats a token and bits a byte."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from model.glam import GLaM
from model.loss import language_model_loss
from parallel.engine import Engine
from pretrain.data import HeldOut, cut_batch


@dataclass(frozen=True)
class HeldOutResult:
    """Figures over the labels of the held-out windows."""

    loss: float  # nats a token
    tokens: int
    bits_per_byte: float | None  # of the text behind the labels; None where the tokenizer is not known
    quarters: tuple[float, ...] = ()  # the loss by quarter of the positions in a window, where it was asked for


def result(loss: float, heldout: HeldOut, text_bytes: int | None) -> HeldOutResult:
    tokens = len(heldout) * heldout.sources[0].length
    bits = loss * tokens / math.log(2) / text_bytes if text_bytes else None
    return HeldOutResult(loss, tokens, bits)


def evaluate_on_ranks(engine: Engine, heldout: HeldOut, text_bytes: int | None, micro_batch: int) -> HeldOutResult:
    """All data-parallel ranks together; the same figures on each."""
    topology, batches = engine.topology, []
    if engine.reads_data:
        windows = heldout.read(topology.data_rank, topology.data)
        batches = [(torch.from_numpy(t), torch.from_numpy(y)) for t, y in cut_batch(windows, micro_batch)]
    count = len(heldout) // (topology.data * micro_batch)
    return result(engine.evaluate(batches, count), heldout, text_bytes)


@torch.no_grad()
def evaluate_alone(model: GLaM, heldout: HeldOut, text_bytes: int | None, micro_batch: int) -> HeldOutResult:
    """On one process that holds the whole model; by quarter of the positions too: what a long context is good for shows
    in the last."""
    model.eval()
    device = model.embed.weight.device
    total_4, count_4 = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for tokens, labels in cut_batch(heldout.read(), micro_batch):
        hidden = model.hidden(torch.from_numpy(tokens).to(device))
        label_BS = torch.from_numpy(labels).to(device)
        for quarter, (part, label) in enumerate(zip(hidden.tensor_split(4, dim=1), label_BS.tensor_split(4, dim=1))):
            if label.numel():
                loss = language_model_loss(part.flatten(0, 1), model.output_weight, label.flatten())[1]
                total_4[quarter] += float(loss) * label.numel()
                count_4[quarter] += label.numel()
    found = result(float(total_4.sum() / count_4.sum()), heldout, text_bytes)
    return replace(found, quarters=tuple((total_4 / count_4.clamp(min=1)).tolist()))
