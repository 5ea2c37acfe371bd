"""The chunked loss against the plain one; injected losses against added ones."""

from __future__ import annotations

import pytest
import torch

from model.inject import inject_loss
from model.loss import language_model_loss, plain_language_model_loss


@pytest.mark.parametrize("z_coef", [0.0, 1e-2])
@pytest.mark.parametrize("logit_bytes", [2**30, 7 * 50 * 4, 50 * 4], ids=["one chunk", "seven tokens", "one token"])
def test_chunked_loss_equals_plain(z_coef: float, logit_bytes: int) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(23, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    labels = torch.randint(0, 50, (23,))
    plain = plain_language_model_loss(hidden, weight, labels, z_coef)
    wanted = torch.autograd.grad(plain * 3, [hidden, weight])
    loss, cross_entropy = language_model_loss(hidden, weight, labels, z_coef, logit_bytes)
    found = torch.autograd.grad(loss * 3, [hidden, weight])
    torch.testing.assert_close(loss, plain, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(cross_entropy, plain_language_model_loss(hidden, weight, labels).detach())
    assert not cross_entropy.requires_grad
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_chunked_loss_gradcheck() -> None:
    hidden = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 7, (5,))

    def loss(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return language_model_loss(hidden, weight, labels, 0.1, 2 * 7 * 4)[0]

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_bf16_gradients_are_summed_in_float32() -> None:
    """4,096 chunks of one token: in bf16 the sum would stall at a few hundred equal additions."""
    torch.manual_seed(0)
    hidden = torch.ones(4096, 8, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.zeros(4, 8, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(4096, dtype=torch.int64)
    (one,) = torch.autograd.grad(language_model_loss(hidden, weight, labels)[0], [weight])
    (many,) = torch.autograd.grad(language_model_loss(hidden, weight, labels, logit_bytes=16)[0], [weight])
    torch.testing.assert_close(many, one, rtol=1e-2, atol=1e-3)


def test_injected_loss_has_the_gradient_of_an_added_one() -> None:
    x = torch.randn(6, requires_grad=True)
    added = torch.autograd.grad((x * x).sum() + 0.25 * x.exp().sum(), x)[0]
    through = inject_loss(x * 1.0, x.exp().sum(), 0.25)
    assert torch.equal(through, x)
    # The injection point lies on the path of the main loss; what it carries is not scaled by it.
    injected = torch.autograd.grad((through * through).sum(), x)[0]
    torch.testing.assert_close(injected, added)
