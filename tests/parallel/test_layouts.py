"""Every layout trains like one process that runs plain PyTorch: losses, gradients, norm, router loads, weights.

Tolerance: float32 sums in another order differ by about 1e-6 of their size; 1e-5 leaves room for a few in a row.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

from configs.run import RunConfig
from pretrain.local_ranks import run_ranks
from tests.parallel.jobs import assemble, train_job
from tests.tiny import make_model, tiny_config, token_windows

STEPS = 3
MODELS = {
    "dropless": (),
    "capacity": ("model.moe.router.capacity={factor: 0.8}",),
    "untied gated": ("model.tied_embedding=false", "model.moe.expert.gated=true", "model.moe.router.z_coef=0.01"),
    "dense": ("model.moe=null",),
}
COMMON = ("model.lm_z_coef=1e-3", "train.clip_norm=0.5")  # the norm is above 1 here, so clipping acts


@lru_cache
def oracle(model_kind: str) -> dict[str, Any]:
    """The same training without DeepSpeed, ranks, micro-batches or chunks: whole batch, autograd, torch's AdamW."""
    config = tiny_config(*COMMON, *MODELS[model_kind])
    model = make_model(config.model, config.train.seed)
    spec = config.train.optimizer
    flat = [(n, p) for n, p in model.named_parameters() if p.ndim < 2 or n.endswith("bias.table")]
    deep = [p for n, p in model.named_parameters() if n not in dict(flat)]
    optimizer = torch.optim.AdamW(
        [{"params": deep, "weight_decay": spec.weight_decay}, {"params": [p for _, p in flat], "weight_decay": 0.0}],
        lr=1e-2,
        betas=(spec.beta1, spec.beta2),
        eps=spec.epsilon,
    )
    figures, first = [], {}
    for step in range(STEPS):
        windows = token_windows(config, config.train.batch_sequences, seed=100 + step)
        model.cross_entropies.clear()
        x = windows[:, :-1]
        for layer in model.layers():
            x = layer(x)
        optimizer.zero_grad()
        model.loss(x, windows[:, 1:]).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        figures.append((model.cross_entropies[0].item(), norm.item()))
        first = first or {n: optimizer.state[p]["exp_avg"].clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        model.eval()
        windows = token_windows(config, config.train.batch_sequences, seed=100 + 99)
        logits = model(windows[:, :-1])
        evaluated = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).item()
    loads = {layer: block.totals.reports[-1].load_E for layer, block in model.moe_blocks().items()}
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return {"figures": figures, "gradients": first, "weights": weights, "loads": loads, "evaluated": evaluated}


def compare(found: list[dict[str, Any]], wanted: dict[str, Any]) -> None:
    for rank in found:
        assert rank["figures"] == found[0]["figures"]  # every rank saw the same
        assert rank["evaluated"] == found[0]["evaluated"]
    for (loss, norm), (wanted_loss, wanted_norm) in zip(found[0]["figures"], wanted["figures"]):
        assert loss == pytest.approx(wanted_loss, rel=1e-5)
        assert norm == pytest.approx(wanted_norm, rel=1e-5)
    # The cross-entropy alone, without the z-loss that training adds; after three steps of rounding.
    assert found[0]["evaluated"] == pytest.approx(wanted["evaluated"], rel=1e-4)
    # After one step the first moment is (1 - beta1) x the clipped gradient: the gradient itself, tensor by tensor.
    gradients = assemble([rank["first"] for rank in found])
    for name, gradient in wanted["gradients"].items():
        close(gradients[f"{name}/exp_avg"], gradient, 1e-5, name)
    weights = assemble([rank["last"] for rank in found])
    for name, weight in wanted["weights"].items():
        # AdamW divides by the root of a tiny second moment: where a gradient is near zero, its rounding is amplified.
        close(weights[f"{name}/weight"], weight, 1e-3, name)
    for layer, load in wanted["loads"].items():
        assert found[0]["loads"][layer][:-4].tolist() == load.tolist()


def close(found: Tensor, wanted: Tensor, relative: float, name: str) -> None:
    """Within `relative` of the tensor's own norm."""
    assert found.shape == wanted.shape, name
    error = (found - wanted).norm() / wanted.norm().clamp(min=1e-12)
    assert error <= relative, f"{name}: relative error {error:.2e}"


def run(num_ranks: int, *overrides: str) -> tuple[RunConfig, list[dict[str, Any]]]:
    config = tiny_config(*COMMON, *overrides)
    return config, run_ranks(num_ranks, train_job, config, STEPS)


@pytest.mark.parametrize(
    ("ranks", "expert", "micro_batch", "kind", "more"),
    [
        (1, 1, 8, "dropless", ()),
        (1, 1, 2, "dropless", ()),
        (1, 1, 1, "capacity", ("train.recompute=true",)),
        (2, 1, 4, "dropless", ()),
        (2, 2, 4, "dropless", ()),
        (2, 2, 1, "dropless", ("train.recompute=true",)),
        (2, 2, 2, "capacity", ()),
        (2, 2, 2, "untied gated", ()),
        (2, 1, 2, "dense", ()),
        (4, 2, 1, "dropless", ()),
        (4, 4, 2, "capacity", ("train.recompute=true",)),
    ],
)
def test_layout_equals_plain_pytorch(
    ranks: int, expert: int, micro_batch: int, kind: str, more: tuple[str, ...]
) -> None:
    overrides = (*MODELS[kind], f"parallel.expert={expert}", f"train.micro_batch_sequences={micro_batch}", *more)
    compare(run(ranks, *overrides)[1], oracle(kind))


def test_bf16_layouts_agree_to_bf16() -> None:
    """bf16 products round at 2^-9; float32 masters keep the sums. A wrong factor would show as 1/2 or 2."""
    alone = run(1, "train.precision=bf16", "train.micro_batch_sequences=8")[1]
    spread = run(2, "train.precision=bf16", "train.micro_batch_sequences=1", "parallel.expert=2")[1]
    exact = oracle("dropless")
    for found in (alone, spread):
        for (loss, norm), (wanted_loss, wanted_norm) in zip(found[0]["figures"], exact["figures"]):
            assert loss == pytest.approx(wanted_loss, rel=1e-2)
            assert norm == pytest.approx(wanted_norm, rel=3e-2)
        gradients = assemble([rank["first"] for rank in found])
        for name, gradient in exact["gradients"].items():
            close(gradients[f"{name}/exp_avg"], gradient, 0.2, name)  # a token near a tie may change its expert
