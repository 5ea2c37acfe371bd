"""Positions: T5's relative bias (GLaM) and rotary embedding (the modern preset).

B batch, S sequence of queries, K sequence of keys, H heads, N head width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from configs.attention import RelativeBias


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
        self.heads: slice = slice(None)  # of those in the table, the heads whose scores are computed here

    def own_heads(self) -> Tensor:
        """The table's rows for the heads here, [H, buckets]; in float32 at least, as the gradient of a bucket is a sum
        of thousands of scores' (in bf16 it came out wrong by up to half)."""
        table = self.table[self.heads]
        return table if table.dtype == torch.float64 else table.float()

    def at(self, distance: Tensor) -> Tensor:
        """Bias at distances to earlier positions (negative ones count as 0): [..., S, K] -> [H, ..., S, K]."""
        return self.own_heads()[:, self._bucket(distance)]

    def at_by_head(self, distance_BHST: Tensor) -> Tensor:
        """The same where each head has distances of its own: [B, H, S, T] -> [B, H, S, T]."""
        head_H11 = torch.arange(distance_BHST.shape[1], device=self.table.device)[:, None, None]
        return self.own_heads()[head_H11, self._bucket(distance_BHST)]

    def _bucket(self, distance: Tensor) -> Tensor:
        c = self.config
        number = torch.arange(c.max_distance + 1, device=self.table.device)
        return relative_bucket(number, c.num_buckets, c.max_distance)[distance.clamp(0, c.max_distance)]

    def forward(self, num_queries: int, num_keys: int) -> Tensor:
        """Bias with the causal mask in it, [1, H, S, K]: the queries are the last S of the K positions."""
        query_S1 = torch.arange(num_keys - num_queries, num_keys, device=self.table.device)[:, None]
        offset_SK = query_S1 - torch.arange(num_keys, device=self.table.device)[None, :]
        return self.at(offset_SK).masked_fill(offset_SK < 0, float("-inf"))[None]

    def tiles(self, block_size: int) -> Tensor:
        """[H, distances, b, b]: the bias of a block of b queries on a block of b keys so many blocks before it; the
        last one holds for every greater distance too."""
        inside = torch.arange(block_size, device=self.table.device)
        last = -(-(self.config.max_distance - 1) // block_size) + 1
        block = torch.arange(last + 1, device=self.table.device)[:, None, None] * block_size
        return self.at(block + inside[:, None] - inside)


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
