"""Block-sparse causal attention of one layer: its layout, and the kernel that the device and the configuration pick.

B batch, H heads, G groups of heads that share keys and values, S queries, N head width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from configs.attention import FLEX_BLOCK_SIZE, AttentionConfig, FullLayout, Kernel, SparseConfig
from model import block_kernel
from model.block_layout import BlockLayout
from model.flex_kernel import FlexPlan, flex_attend, flex_plan
from model.patterns import block_layout
from model.position import RelativePositionBias

GATHERED_BYTES = 128 * 2**20  # of probabilities that one layer may keep for its backward pass before it recomputes them
P = TypeVar("P")


def layer_blocks(spec: AttentionConfig, layer: int) -> SparseConfig | None:
    """What a layer looks at, in blocks; None where that is all of the past, documents or not."""
    if spec.sparse and spec.sparse.is_sparse(layer):
        return spec.sparse
    if spec.document_end is None:
        return None
    if spec.sparse is None:
        return SparseConfig(layout=FullLayout(), block_size=128)
    return spec.sparse.model_copy(update={"layout": FullLayout()})


class SparseAttention:
    """softmax(q k^T / sqrt(N) + bias) v over the blocks of one layer's layout.

    Attributes:
        groups: numbers, in the whole model, of the groups of heads that are here; whoever cuts heads sets it.
    """

    def __init__(self, spec: SparseConfig, layer: int, num_groups: int) -> None:
        self.spec, self.layer, self.groups = spec, layer, range(num_groups)
        self._layout: BlockLayout | None = None
        self._made_for: tuple[int, range] | None = None
        self._plans: dict[tuple[object, ...], Any] = {}  # of this layout, where documents do not ask for their own

    def layout(self, length: int) -> BlockLayout:
        """The layout of a sequence, on the CPU; made once for each length."""
        if self._layout is None or self._made_for != (length, self.groups):
            self._layout, self._made_for = (
                block_layout(self.spec, self.layer, self.groups, length),
                (length, self.groups),
            )
            self._plans.clear()
        return self._layout

    def __call__(
        self,
        q_BHSN: Tensor,
        k_BGSN: Tensor,
        v_BGSN: Tensor,
        bias: RelativePositionBias | None = None,
        start_BS: Tensor | None = None,
        once: bool = False,
    ) -> Tensor:
        """[B, H, S, N].

        Args:
            start_BS: where the document of each token starts; documents do not see each other.
            once: such a length will hardly come again (a prompt's): not worth compiling a kernel for.
        """
        length, kernel = q_BHSN.shape[2], self.kernel(q_BHSN)
        if once and kernel != "dense":
            kernel = "chunked"
        if kernel == "dense":
            return dense_attention(q_BHSN, k_BGSN, v_BGSN, self.layout(length).to(q_BHSN.device), bias, start_BS)
        if kernel == "flex":
            return flex_attend(q_BHSN, k_BGSN, v_BGSN, self._flex_plan(q_BHSN, start_BS), bias)
        made = self._gather_plan(k_BGSN, start_BS)
        tiles = None if bias is None else bias.tiles(self.spec.block_size)
        return block_kernel.attend(q_BHSN, k_BGSN, v_BGSN, tiles, made, keep=kernel == "gathered")

    def kernel(self, q_BHSN: Tensor) -> Kernel:
        """Which kernel serves such queries.

        Raises:
            RuntimeError: `flex` is asked for on a CPU, where it has no backward pass.
        """
        if self.spec.kernel == "flex" and not q_BHSN.is_cuda:
            if torch.is_grad_enabled():
                raise RuntimeError("model.attention.sparse.kernel=flex trains on a GPU only; this is a CPU: set auto")
            return "chunked"
        if self.spec.kernel != "auto":
            return self.spec.kernel
        if q_BHSN.is_cuda:
            return "flex" if self.spec.block_size >= FLEX_BLOCK_SIZE else "chunked"
        return "gathered" if self.kept_bytes(q_BHSN) <= GATHERED_BYTES else "chunked"

    def _flex_plan(self, q_BHSN: Tensor, start_BS: Tensor | None) -> FlexPlan:
        _, heads, length, _ = q_BHSN.shape
        layout = self.layout(length)
        key = ("flex", heads, q_BHSN.device)
        return self._kept(key, start_BS, lambda: flex_plan(layout.to(q_BHSN.device), heads, start_BS))

    def _gather_plan(self, k_BGSN: Tensor, start_BS: Tensor | None) -> block_kernel.Plan:
        batch, groups, length, _ = k_BGSN.shape
        layout, device = self.layout(length), k_BGSN.device
        key = ("gather", batch, groups, device)
        return self._kept(key, start_BS, lambda: block_kernel.plan(layout, batch, groups, start_BS, device))

    def _kept(self, key: tuple[object, ...], start_BS: Tensor | None, make: Callable[[], P]) -> P:
        """What was made for this key and layout; made anew where documents decide."""
        if start_BS is not None:
            return make()
        if key not in self._plans:
            self._plans[key] = make()
        plan: P = self._plans[key]
        return plan

    def kept_bytes(self, q_BHSN: Tensor) -> int:
        """Bytes of all probabilities."""
        batch, heads, length, _ = q_BHSN.shape
        layout = self.layout(length)
        a_group = float((layout.blocks_GRK >= 0).sum()) / layout.blocks_GRK.shape[0] * layout.block_size**2
        return int(batch * heads * a_group * q_BHSN.element_size())


def dense_attention(
    q_BHSN: Tensor,
    k_BGSN: Tensor,
    v_BGSN: Tensor,
    layout: BlockLayout,
    bias: RelativePositionBias | None,
    start_BS: Tensor | None,
) -> Tensor:
    """The slow twin: scores of length x length under a mask."""
    share = q_BHSN.shape[1] // k_BGSN.shape[1]
    position = torch.arange(q_BHSN.shape[2], device=q_BHSN.device)
    visible = layout.visible(position, position, start_BS)
    visible = visible.expand(-1, k_BGSN.shape[1], -1, -1).repeat_interleave(share, 1)
    return attend_where(q_BHSN, k_BGSN, v_BGSN, visible, bias, position, position)


def attend_where(
    q_BHSN: Tensor,
    k_BGTN: Tensor,
    v_BGTN: Tensor,
    visible: Tensor,
    bias: RelativePositionBias | None,
    query_S: Tensor,
    key_T: Tensor,
) -> Tensor:
    """Attention by plain tensor work.

    Args:
        visible: bool [B or 1, H or 1, S, T].
        query_S, key_T: int64 positions; keys may also be [B, H, T].
    """
    mask = torch.zeros(visible.shape, dtype=q_BHSN.dtype, device=q_BHSN.device)
    mask = mask.masked_fill(~visible, float("-inf"))
    if bias is not None:
        distance = query_S[:, None] - key_T[..., None, :]
        mask = mask + (bias.at(distance) if distance.ndim == 2 else bias.at_by_head(distance)).to(mask.dtype)
    return F.scaled_dot_product_attention(
        q_BHSN, k_BGTN, v_BGTN, attn_mask=mask, enable_gqa=q_BHSN.shape[1] != k_BGTN.shape[1]
    )
