"""One pre-norm decoder block: attention, then a dense or a mixture-of-experts feed-forward layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from configs.model import ModelConfig
from model.attention import Attention
from model.feedforward import FeedForward
from model.inject import inject_loss
from model.kv_cache import KeyValueCache
from model.moe import MoE, MoEReport, MoETotals
from model.norm import RMSNorm


class Block(nn.Module):
    """x[B, S, D] -> [B, S, D].

    Attributes set from outside:
        recompute: rebuild this block's activations in the backward pass instead of keeping them.
        aux_scale: 1 / (micro-batches of a step x ranks that compute the same loss); the gradient the auxiliary loss
            receives.
        totals: router statistics of training passes since they were last taken.
        documents: where documents start ([B, S]) in each of the passes to come (`GLaM.expect`); None where they see
            each other.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.width, config.norm_epsilon)
        self.attention = Attention(config, layer)
        self.ffn_norm = RMSNorm(config.width, config.norm_epsilon)
        self.moe = MoE(config.width, config.moe) if config.moe and config.is_moe(layer) else None
        self.ffn = FeedForward(config.width, config.ffn) if self.moe is None else None
        self.recompute = False
        self.aux_scale = 1.0
        self.totals = MoETotals()
        self.documents: Iterator[Tensor] | None = None if config.attention.document_end is None else iter(())

    def forward(self, x_BSD: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        start_BS = None
        if self.documents is not None and (start_BS := next(self.documents, None)) is None:
            raise RuntimeError("model.attention.document_end is set, and nobody told the documents: GLaM.expect first")
        if self.recompute and torch.is_grad_enabled():
            out = checkpoint(self._layers, x_BSD, None, start_BS, use_reentrant=False, context_fn=_keep_routing)
        else:
            out = self._layers(x_BSD, cache, start_BS)
        y_BSD, aux_loss, report = out
        # Outside the checkpoint: a recomputed forward pass must not count twice.
        if report is not None and self.training:
            self.totals.add(report)
        if aux_loss is not None and torch.is_grad_enabled():
            y_BSD = inject_loss(y_BSD, aux_loss, self.aux_scale)
        return y_BSD

    def _layers(
        self, x_BSD: Tensor, cache: KeyValueCache | None = None, start_BS: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None, MoEReport | None]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cache, start_BS)
        if self.moe is not None:
            y_BSD, aux_loss, report = self.moe(self.ffn_norm(x_BSD))
            return x_BSD + y_BSD, aux_loss, report
        assert self.ffn is not None
        return x_BSD + self.ffn(self.ffn_norm(x_BSD)), None, None


def _keep_routing() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """Checkpoint contexts that keep the indices of every top-k.

    Kernels that differ in the last bit between forward and recompute could otherwise send a token elsewhere the
    second time: other row counts, a crash at best, a wrong gradient or a hung all-to-all at worst.
    """

    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op is torch.ops.aten.topk.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)  # type: ignore[no-any-return]
