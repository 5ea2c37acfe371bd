"""Causal self-attention with grouped-query heads, full or block-sparse, either position scheme, and decoding.

B batch, S sequence of queries, s the part of it that is here, K sequence of keys, D width, H heads, G groups of heads
that share keys and values, N head width.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.attention import RelativeBias, Rotary
from configs.model import ModelConfig
from model.kv_cache import BlockCache, KeyValueCache
from model.norm import RMSNorm
from model.position import RelativePositionBias, rotate
from model.sparse_attention import SparseAttention, attend_where, layer_blocks


class HeadExchange(Protocol):
    """Part of every sequence, all heads <-> whole sequences, part of the heads: the seam of context parallelism."""

    def enter(self, q_BHsN: Tensor, k_BGsN: Tensor, v_BGsN: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...

    def leave(self, y_BHSN: Tensor) -> Tensor: ...


class NoExchange:
    """Sequences are not split."""

    def enter(self, q_BHsN: Tensor, k_BGsN: Tensor, v_BGsN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return q_BHsN, k_BGsN, v_BGsN

    def leave(self, y_BHSN: Tensor) -> Tensor:
        return y_BHSN


class Attention(nn.Module):
    """x[B, S, D] -> [B, S, D]; row i attends to rows <= i. Width of q, k, v is heads x head_width, not D.

    Attributes:
        blocks: the layer's block-sparse attention; None where it is plain full attention.
        exchange: how whole sequences are had where each rank holds a part of them.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
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
        blocks = layer_blocks(spec, layer)
        self.blocks = None if blocks is None else SparseAttention(blocks, layer, spec.kv_heads)
        self.exchange: HeadExchange = NoExchange()

    def new_cache(self, length: int) -> KeyValueCache:
        """A cache for sequences of up to `length` positions."""
        if self.blocks is None:
            return KeyValueCache()
        return BlockCache(self.blocks.layout(length).to(self.query.weight.device))

    def forward(self, x_BSD: Tensor, cache: KeyValueCache | None = None, start_BS: Tensor | None = None) -> Tensor:
        """
        Args:
            cache: the positions before these.
            start_BS: position at which the document of each token starts; over whole sequences, whatever is here.
        """
        q, k, v = self._heads(self.query(x_BSD)), self._heads(self.key(x_BSD)), self._heads(self.value(x_BSD))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = self.query_norm(q), self.key_norm(k)
        q, k, v = self.exchange.enter(q, k, v)
        if isinstance(self.position, Rotary):
            start = cache.length if cache else 0
            q, k = rotate(q, self.position.base, start), rotate(k, self.position.base, start)
        if isinstance(cache, BlockCache):
            y_BHSN = self._decode_blocks(q, k, v, cache, start_BS)
        elif self.blocks is not None:
            y_BHSN = self.blocks(q, k, v, self.bias, start_BS)
        else:
            y_BHSN = self._attend_to_all(q, k, v, cache)
        return self.out(self.exchange.leave(y_BHSN).transpose(1, 2).flatten(2))

    def _heads(self, x_BSD: Tensor) -> Tensor:
        """[B, S, heads*N] -> [B, heads, S, N]."""
        return x_BSD.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def _attend_to_all(self, q: Tensor, k: Tensor, v: Tensor, cache: KeyValueCache | None) -> Tensor:
        """Plain full attention."""
        if cache is not None:
            k, v = cache.extend(k, v)
        mask = self._mask(q, k)
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )

    def _mask(self, q_BHSN: Tensor, k_BGKN: Tensor) -> Tensor | None:
        """Additive mask [1, H, S, K] where the bias or a cache asks for one; None where is_causal says it all."""
        num_queries, num_keys = q_BHSN.shape[2], k_BGKN.shape[2]
        if self.bias is not None:
            return self.bias(num_queries, num_keys).to(q_BHSN.dtype)
        if num_queries == num_keys:
            return None
        allowed = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q_BHSN.device)
        return allowed.tril(num_keys - num_queries)

    def _decode_blocks(self, q: Tensor, k: Tensor, v: Tensor, cache: BlockCache, start_BS: Tensor | None) -> Tensor:
        """Block-sparse attention from the newest positions to what the cache holds."""
        assert self.blocks is not None
        is_prompt = cache.length == 0
        query_S = cache.append(k, v)
        if is_prompt and q.shape[2] > 1:
            y_BHSN = self.blocks(q, k, v, self.bias, start_BS, once=True)
        else:
            keys, values, position_BGT = cache.keys, cache.values, cache.position_BGT
            assert keys is not None and values is not None and position_BGT is not None
            share = q.shape[1] // keys.shape[1]
            visible = cache.layout.visible(query_S, position_BGT, start_BS).expand(-1, keys.shape[1], -1, -1)
            key_BHT = position_BGT.repeat_interleave(share, 1)
            y_BHSN = attend_where(q, keys, values, visible.repeat_interleave(share, 1), self.bias, query_S, key_BHT)
        cache.forget(None if start_BS is None else start_BS[:, -1])
        return y_BHSN
