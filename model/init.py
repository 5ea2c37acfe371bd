"""Initial weights, drawn from the name of each parameter: the same on any layout of ranks.

Linear weights: normal with sigma = fan_in^-0.5; those that write to the residual stream are divided by sqrt(2L)
(GPT-2). Embedding: D^-0.5, so that logits start near unit variance with tied weights, and small beside what the blocks
add, so that a tied model does not start by predicting its own input. Router: sigma = sqrt(0.1 / fan_in) (Switch,
arXiv:2101.03961, sec. 2.4); Shazeer's start at zero.
"""

from __future__ import annotations

import hashlib
import math
from fnmatch import fnmatch

import torch
from torch import Tensor

from configs.model import ModelConfig, NoisyTopKRouter

ONES, ZEROS = -1.0, 0.0
BLOCK_ROWS = 256  # of a matrix, drawn together


def initial_sigma(name: str, config: ModelConfig) -> float:
    """Standard deviation for a parameter, or ONES / ZEROS."""
    if fnmatch(name, "*norm.scale"):
        return ONES
    if fnmatch(name, "*.bias.table") or fnmatch(name, "*.router.noise_weight"):
        return ZEROS
    if fnmatch(name, "*.router.weight"):
        noisy = config.moe is not None and isinstance(config.moe.router, NoisyTopKRouter)
        return ZEROS if noisy else math.sqrt(0.1 / config.width)
    residual = 1 / math.sqrt(2 * config.num_layers)
    if fnmatch(name, "*.attention.out.weight"):
        return residual / math.sqrt(config.attention.num_heads * config.attention.head_width)
    if fnmatch(name, "*.ffn.out_proj.weight"):
        return residual / math.sqrt(config.ffn.width)
    if fnmatch(name, "*.experts.down") and config.moe is not None:
        return residual / math.sqrt(config.moe.expert.width)
    return config.width**-0.5


def initial_value(
    name: str,
    shape: tuple[int, ...],
    config: ModelConfig,
    seed: int,
    offset: tuple[int, ...] | None = None,
    part: tuple[int, ...] | None = None,
) -> Tensor:
    """Float32 CPU tensor: the parameter of whole shape `shape`, or the box of it at `offset` of shape `part`.

    Drawn in blocks of rows, each from its own seed, and stacked experts by global number: a box costs its own rows
    only, and is the same however the whole is cut.
    """
    offset, part = offset or (0,) * len(shape), part or shape
    sigma = initial_sigma(name, config)
    if sigma in (ONES, ZEROS):
        return torch.full(part, 1.0 if sigma == ONES else 0.0)
    if len(shape) == 3:
        experts = range(offset[0], offset[0] + part[0])
        return torch.stack([_box(f"{name}[{e}]", shape[1:], sigma, seed, offset[1:], part[1:]) for e in experts])
    return _box(name, shape, sigma, seed, offset, part)


def _box(
    name: str, shape: tuple[int, ...], sigma: float, seed: int, offset: tuple[int, ...], part: tuple[int, ...]
) -> Tensor:
    """A box of a matrix."""
    (first, column), (rows, columns) = offset, part
    out = torch.empty(part)
    for start in range(first // BLOCK_ROWS * BLOCK_ROWS, first + rows, BLOCK_ROWS):
        height = min(BLOCK_ROWS, shape[0] - start)
        block = _normal(f"{name}/{start}", (height, shape[1]), sigma, seed)
        top, bottom = max(start, first), min(start + height, first + rows)
        out[top - first : bottom - first] = block[top - start : bottom - start, column : column + columns]
    return out


def _normal(name: str, shape: tuple[int, ...], sigma: float, seed: int) -> Tensor:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=7).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big"))
    return torch.randn(shape, generator=generator).mul_(sigma)
