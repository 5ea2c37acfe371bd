"""Positions: T5's relative bias (GLaM) and rotary embedding (the modern preset).

B batch, S sequence of queries, K sequence of keys, H heads, N head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from configs.model import RelativeBias


def relative_bucket(distance: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Bucket of each distance >= 0 to an earlier position: exact below half, then logarithmic (arXiv:1910.10683)."""
    exact = num_buckets // 2
    scaled = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = exact + (scaled * (num_buckets - exact)).to(torch.int64)
    return torch.where(distance < exact, distance, far.clamp(max=num_buckets - 1))


class RelativePositionBias(nn.Module):
    """A learned bias for each head and bucket of distances; each layer has its own."""

    def __init__(self, num_heads: int, config: RelativeBias) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(num_heads, config.num_buckets))
        self.config = config

    def forward(self, num_queries: int, num_keys: int) -> Tensor:
        """Bias with the causal mask in it, [1, H, S, K]: the queries are the last S of the K positions."""
        device = self.table.device
        distance_K = torch.arange(num_keys, device=device)
        bucket_K = relative_bucket(distance_K, self.config.num_buckets, self.config.max_distance)
        bias_HK = self.table[:, bucket_K]
        query_S1 = torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
        offset_SK = query_S1 - distance_K[None, :]
        bias_HSK = bias_HK[:, offset_SK.clamp(min=0)]
        return bias_HSK.masked_fill(offset_SK < 0, float("-inf"))[None]


def rotate(x_BHSN: Tensor, base: float, start: int) -> Tensor:
    """Rotary embedding in float32, the two halves of a head forming the pairs; positions count from `start`."""
    half = x_BHSN.shape[-1] // 2
    device = x_BHSN.device
    frequency = base ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    position = torch.arange(start, start + x_BHSN.shape[-2], device=device, dtype=torch.float32)
    angle_SN = (position[:, None] * frequency[None, :]).repeat(1, 2)
    first, second = x_BHSN.float().chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (x_BHSN.float() * angle_SN.cos() + turned * angle_SN.sin()).to(x_BHSN.dtype)
