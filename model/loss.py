"""Cross-entropy of the next token over a large vocabulary, a chunk of tokens at a time.

T tokens, D width, V vocabulary. All T x V logits at once would cost gigabytes for V = 256K; here they exist for one
chunk only, and the gradients are formed while they do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from model.vocabulary import Vocabulary, WholeVocabulary

LOGIT_BYTES = 512 * 2**20  # float32 logits held at a time


def language_model_loss(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    label_T: Tensor,
    z_coef: float = 0.0,
    logit_bytes: int = LOGIT_BYTES,
    vocabulary: Vocabulary = WholeVocabulary(),  # noqa: B008 (it has no state)
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy in nats + z_coef * mean(logsumexp^2) (PaLM, arXiv:2204.02311, sec. 5), float32.

    Args:
        vocabulary: which rows `weight_VD` holds; the gradient of `hidden_TD` is that through these rows.

    Returns:
        the objective, differentiable; and the cross-entropy alone, detached.
    """
    num_chunks = max(1, -(-hidden_TD.shape[0] * weight_VD.shape[0] * 4 // logit_bytes))
    loss, cross_entropy = _ChunkedLoss.apply(hidden_TD, weight_VD, label_T, z_coef, num_chunks, vocabulary)
    return loss, cross_entropy


def plain_language_model_loss(hidden_TD: Tensor, weight_VD: Tensor, label_T: Tensor, z_coef: float = 0.0) -> Tensor:
    """The slow twin: all logits at once, through autograd."""
    logits_TV = F.linear(hidden_TD, weight_VD).float()
    return F.cross_entropy(logits_TV, label_T) + z_coef * logits_TV.logsumexp(-1).square().mean()


class _ChunkedLoss(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        label_T: Tensor,
        z_coef: float,
        num_chunks: int,
        vocabulary: Vocabulary,
    ) -> tuple[Tensor, Tensor]:
        with_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        total = torch.zeros((), dtype=torch.float64 if hidden_TD.dtype == torch.float64 else torch.float32)
        total = total.to(hidden_TD.device)
        z_total = total.clone()
        grad_hidden = torch.empty_like(hidden_TD) if with_grad else None
        # float32, or many small bf16 additions would be lost.
        grad_weight = torch.zeros_like(weight_VD, dtype=total.dtype) if with_grad and num_chunks > 1 else None
        start = 0
        for hidden, label in zip(hidden_TD.chunk(num_chunks), label_T.chunk(num_chunks)):
            logits = F.linear(hidden, weight_VD).to(total.dtype)
            # Softmax by hand: one pass of exp gives the normaliser and, scaled, the gradient.
            largest = vocabulary.largest(logits.amax(-1, keepdim=True))
            row, here = vocabulary.rows(label[:, None], weight_VD.shape[0])
            label_logit = logits.gather(-1, row)
            label_logit = label_logit if here is None else label_logit * here
            exps = logits.sub_(largest).exp_()
            label_logit, sums = vocabulary.total(label_logit, exps.sum(-1, keepdim=True))
            normaliser = largest + sums.log()
            total += (normaliser - label_logit).sum()
            z_total += normaliser.square().sum()
            if with_grad:
                # d/dlogits of (cross-entropy + z_coef * logsumexp^2) = softmax * (1 + 2 z_coef logsumexp) - one hot
                grad = exps.mul_((1 + 2 * z_coef * normaliser) / (sums * len(label_T)))
                one_hot = grad.new_full((len(label), 1), -1 / len(label_T))
                grad.scatter_add_(-1, row, one_hot if here is None else one_hot * here)
                grad_logits = grad.to(hidden_TD.dtype)
                assert grad_hidden is not None
                torch.mm(grad_logits, weight_VD, out=grad_hidden[start : start + len(label)])
                if grad_weight is not None and grad_weight.dtype == hidden.dtype:
                    grad_weight.addmm_(grad_logits.t(), hidden)
                else:
                    product = grad_logits.t().mm(hidden)
                    grad_weight = product if grad_weight is None else grad_weight.add_(product)
            start += len(label)
        if with_grad:
            assert grad_weight is not None
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight_VD.dtype))
        cross_entropy = total / len(label_T)
        loss = cross_entropy + z_coef * z_total / len(label_T)
        ctx.mark_non_differentiable(cross_entropy)
        return loss, cross_entropy

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight = ctx.saved_tensors
        return (
            grad_hidden * grad_loss.to(grad_hidden.dtype),
            grad_weight * grad_loss.to(grad_weight.dtype),
            *[None] * 4,
        )
