"""Small block-sparse layouts of every kind, and inputs for them, shared by the tests of patterns and kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from configs.attention import (
    BigBirdLayout,
    EtcLayout,
    FullLayout,
    LayoutConfig,
    RelativeBias,
    SparseConfig,
    StridedLayout,
    WindowLayout,
)
from model.position import RelativePositionBias

BLOCK = 16
LAYOUTS: dict[str, LayoutConfig] = {
    "window": WindowLayout(window=2),
    "bigbird": BigBirdLayout(sinks=1, window=2, random=2),
    "bigbird without sinks": BigBirdLayout(sinks=0, window=1, random=1),
    "etc": EtcLayout(sinks=1, window=2, segment_tokens=64, summary_tokens=3),
    "etc of whole blocks": EtcLayout(sinks=2, window=1, segment_tokens=16, summary_tokens=16),
    "strided": StridedLayout(window=2, stride=3),
    "full": FullLayout(),
}


def spec_of(name: str, kernel: str = "auto", block_size: int = BLOCK) -> SparseConfig:
    return SparseConfig.model_validate({"layout": LAYOUTS[name], "kernel": kernel, "block_size": block_size})


def random_starts(batch: int, length: int, generator: torch.Generator, mean: int = 30) -> Tensor:
    """Documents of so many tokens on average: int64 [B, S] position of the first token of each token's."""
    first = torch.rand(batch, length, generator=generator) < 1 / mean
    return torch.where(first, torch.arange(length), 0).cummax(1).values


def random_heads(
    batch: int, groups: int, share: int, length: int, width: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values (with gradients) and the gradient of the output."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> Tensor:
        return torch.randn(batch, heads, length, width, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v, grad = draw(groups * share), draw(groups), draw(groups), draw(groups * share)
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), grad


def random_bias(heads: int, dtype: torch.dtype) -> RelativePositionBias:
    """A bias table with values of its own; far enough that summaries lie in its last bucket."""
    bias = RelativePositionBias(heads, RelativeBias(num_buckets=8, max_distance=BLOCK)).to(dtype)
    with torch.no_grad():
        bias.table.copy_(torch.randn(bias.table.shape, generator=torch.Generator().manual_seed(3)))
    return bias
