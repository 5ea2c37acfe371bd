"""A tiny run configuration that every layout of these tests can carry, and variations of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from configs.model import ModelConfig
from configs.run import RunConfig
from model.glam import GLaM
from model.init import initial_value

TREE: dict[str, Any] = {
    "name": "tiny",
    "run_dir": "unused",
    "model": {
        "vocab_size": 64,
        "num_layers": 4,
        "width": 32,
        "attention": {"num_heads": 2, "head_width": 24},
        "ffn": {"width": 48},
        "moe": {
            "num_experts": 4,
            "expert": {"width": 40, "activation": "relu", "gated": False},
            "router": {"kind": "topk"},
        },
    },
    "data": {"sources": [{"name": "a", "path": "unused"}]},
    "train": {
        "steps": 6,
        "sequence_length": 16,
        "batch_tokens": 128,
        "micro_batch_sequences": 2,
        "optimizer": {"peak_lr": 1e-2},
        "schedule": {"kind": "cosine", "warmup_steps": 1},
        "precision": "float32",
    },
}


def tiny_config(*overrides: str) -> RunConfig:
    """TREE with dotted overrides."""
    import copy

    from configs.base import set_dotted

    tree = copy.deepcopy(TREE)
    for item in overrides:
        set_dotted(tree, item)
    return RunConfig.check(tree, "tests/tiny.py")


def make_model(config: ModelConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> GLaM:
    """A whole model with its initial weights, on this process."""
    with torch.device("meta"):
        model = GLaM(config)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(initial_value(name, tuple(parameter.shape), config, seed))
    return model.to(dtype)


def token_windows(config: RunConfig, sequences: int, seed: int = 1) -> Tensor:
    """Random tokens [sequences, S + 1]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, config.model.vocab_size, (sequences, config.train.sequence_length + 1), generator=generator)


def randomise_tables(model: GLaM, seed: int = 5) -> None:
    """Give parameters that start at zero or one some character, so that tests see their effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias.table", "noise_weight", "norm.scale")):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
