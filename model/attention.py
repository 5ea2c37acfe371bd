"""Causal self-attention with grouped-query heads, either position scheme, and a cache for decoding.

B batch, S sequence of queries, K sequence of keys, D width, H heads, N head width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.model import ModelConfig, RelativeBias, Rotary
from model.norm import RMSNorm
from model.position import RelativePositionBias, rotate


class KeyValueCache:
    """Keys and values of all positions seen so far by one layer, each [B, kv heads, K, N]."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append the newest positions; returns everything cached."""
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat((self.keys, keys), dim=2), torch.cat((self.values, values), dim=2)
        self.keys, self.values = keys, values
        return keys, values


class Attention(nn.Module):
    """x[B, S, D] -> [B, S, D]; row i attends to rows <= i. Width of q, k, v is heads x head_width, not D."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        spec, width = config.attention, config.width
        self.head_width, self.position = spec.head_width, spec.position
        self.query = nn.Linear(width, spec.num_heads * spec.head_width, bias=False)
        self.key = nn.Linear(width, spec.kv_heads * spec.head_width, bias=False)
        self.value = nn.Linear(width, spec.kv_heads * spec.head_width, bias=False)
        self.out = nn.Linear(spec.num_heads * spec.head_width, width, bias=False)
        self.query_norm = RMSNorm(spec.head_width, config.norm_epsilon) if spec.qk_norm else None
        self.key_norm = RMSNorm(spec.head_width, config.norm_epsilon) if spec.qk_norm else None
        self.bias = (
            RelativePositionBias(spec.num_heads, spec.position) if isinstance(spec.position, RelativeBias) else None
        )

    def forward(self, x_BSD: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        start = cache.length if cache else 0
        q, k, v = self._heads(self.query(x_BSD)), self._heads(self.key(x_BSD)), self._heads(self.value(x_BSD))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        if isinstance(self.position, Rotary):
            q, k = rotate(q, self.position.base, start), rotate(k, self.position.base, start)
        if cache is not None:
            k, v = cache.extend(k, v)
        y_BHSN = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=self._mask(q, k),
            is_causal=self._is_plain_causal(start),
            enable_gqa=q.shape[1] != k.shape[1],
        )
        return self.out(y_BHSN.transpose(1, 2).flatten(2))

    def _heads(self, x_BSD: Tensor) -> Tensor:
        """[B, S, heads*N] -> [B, heads, S, N]."""
        return x_BSD.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def _is_plain_causal(self, start: int) -> bool:
        return self.bias is None and start == 0

    def _mask(self, q_BHSN: Tensor, k_BHKN: Tensor) -> Tensor | None:
        """Additive mask [1, H, S, K] where the bias or a cache asks for one; None where is_causal says it all."""
        num_queries, num_keys = q_BHSN.shape[2], k_BHKN.shape[2]
        if self.bias is not None:
            return self.bias(num_queries, num_keys).to(q_BHSN.dtype)
        if num_queries == num_keys:
            return None
        allowed = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q_BHSN.device)
        return allowed.tril(num_keys - num_queries)
