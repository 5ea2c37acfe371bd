"""Attention: heads, positions, and which blocks of the past a row may see (spec: BigBird arXiv:2007.14062, ETC
arXiv:2004.08483, made causal).

A row block is `block_size` queries, a key block as many keys; row block i may look at key blocks 0 ... i only.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from configs.base import Strict


class RelativeBias(Strict):
    """T5's bucketed bias on attention logits, one table a layer (arXiv:1910.10683, sec. 2.1)."""

    kind: Literal["relative_bias"] = "relative_bias"
    num_buckets: int = Field(default=32, ge=2)
    max_distance: int = Field(default=128, ge=2)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_distance <= self.num_buckets // 2:
            raise ValueError(
                f"max_distance={self.max_distance} must exceed num_buckets / 2 = {self.num_buckets // 2}: "
                "half of the buckets hold one distance each"
            )
        return self


class Rotary(Strict):
    """Rotary embedding of queries and keys, halves rotated (arXiv:2104.09864)."""

    kind: Literal["rotary"] = "rotary"
    base: float = Field(default=10_000.0, gt=0)


PositionConfig = Annotated[RelativeBias | Rotary, Field(discriminator="kind")]


class WindowLayout(Strict):
    """The newest `window` blocks, the row's own among them."""

    kind: Literal["window"] = "window"
    window: int = Field(default=3, ge=1)


class BigBirdLayout(Strict):
    """Sinks (the first blocks), a window, and blocks drawn at random from the past between them.

    Drawn for each layer, row and head anew; heads that share keys and values (grouped queries) share what is drawn.
    """

    kind: Literal["bigbird"] = "bigbird"
    sinks: int = Field(default=1, ge=0)
    window: int = Field(default=3, ge=1)
    random: int = Field(default=3, ge=0)
    seed: int = Field(default=0, ge=0, lt=2**31)


class EtcLayout(Strict):
    """Sinks, a window, and summaries: the last `summary_tokens` of every `segment_tokens`, seen by all later rows.

    The row block that ends a segment sees all of it, so that its last tokens can sum it up. Linear in length up to
    the summaries, of which a row sees length / segment_tokens.
    """

    kind: Literal["etc"] = "etc"
    sinks: int = Field(default=1, ge=0)
    window: int = Field(default=3, ge=1)
    segment_tokens: int = Field(gt=0)
    summary_tokens: int = Field(default=1, ge=1)


class StridedLayout(Strict):
    """A window, and the last block of every `stride` blocks (arXiv:1904.10509, the "fixed" pattern). Not linear: a row
    sees length / (stride x block_size) of those."""

    kind: Literal["strided"] = "strided"
    window: int = Field(default=3, ge=1)
    stride: int = Field(default=8, ge=2)


class FullLayout(Strict):
    """Every earlier block, through the block-sparse kernels: for comparisons."""

    kind: Literal["full"] = "full"


LayoutConfig = Annotated[
    WindowLayout | BigBirdLayout | EtcLayout | StridedLayout | FullLayout, Field(discriminator="kind")
]
Kernel = Literal["auto", "dense", "gathered", "chunked", "flex"]
FLEX_BLOCK_SIZE = 64  # FlexAttention's tiles are no smaller


class SparseConfig(Strict):
    """Block-sparse causal attention in the layers marked S; layers marked F stay full."""

    pattern: str = Field(default="S", pattern="^[SF]+$")  # tiled over the layers: SSSF is full in every fourth
    block_size: Literal[16, 32, 64, 128] = 64  # tokens; 128 suits GPUs best, 16 and 32 short sequences
    layout: LayoutConfig = BigBirdLayout()
    # auto: flex (FlexAttention) on a GPU, from blocks of 64 on; elsewhere gathered while the probabilities it keeps for
    # the backward pass are few, then chunked, which recomputes them. dense is the slow twin: a mask of length x length.
    kernel: Kernel = "auto"

    @model_validator(mode="after")
    def _check(self) -> Self:
        spec, block = self.layout, self.block_size
        if self.kernel == "flex" and block < FLEX_BLOCK_SIZE:
            raise ValueError(f"kernel=flex wants blocks of {FLEX_BLOCK_SIZE} tokens at least, block_size={block}")
        if spec.kind == "etc":
            if spec.segment_tokens % block:
                raise ValueError(f"segment_tokens={spec.segment_tokens} is no multiple of block_size={block}")
            if spec.summary_tokens > block:
                raise ValueError(f"summary_tokens={spec.summary_tokens} exceeds block_size={block}")
        return self

    def is_sparse(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) is one of those marked S."""
        return self.pattern[layer % len(self.pattern)] == "S"


class AttentionConfig(Strict):
    """Causal self-attention; heads x head_width need not equal the width (GLaM's large rows use twice it)."""

    num_heads: int = Field(gt=0)  # H
    head_width: int = Field(gt=0)  # N
    # Fewer than num_heads: grouped-query attention; None: one per head.
    num_kv_heads: int | None = Field(default=None, ge=1)
    qk_norm: bool = False
    position: PositionConfig = RelativeBias()
    sparse: SparseConfig | None = None
    # The token that ends a document. If given, documents packed into one sequence do not see each other; `glam prep`
    # writes it behind each (manifest.json: eos_id).
    document_end: int | None = Field(default=None, ge=0)

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_kv_heads={self.kv_heads} must divide num_heads={self.num_heads}")
        if self.position.kind == "rotary" and self.head_width % 2:
            raise ValueError(f"head_width={self.head_width} must be even for rotary positions")
        if self.sparse and self.sparse.layout.kind == "etc" and self.position.kind == "relative_bias":
            nearest = (self.sparse.layout.window - 1) * self.sparse.block_size + 1
            if nearest < self.position.max_distance:
                raise ValueError(
                    f"summaries are seen from {nearest} tokens on (window, block_size), which must reach the relative "
                    f"bias' max_distance={self.position.max_distance}: widen sparse.layout.window"
                )
        return self
