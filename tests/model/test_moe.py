"""The mixture-of-experts layer against a loop over tokens, its kernels against each other, its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from configs.model import CapacityConfig, ExpertChoiceRouter, FeedForwardConfig, MoEConfig, RouterConfig, TopKRouter
from model.experts import experts_by_grouped_product, experts_by_loop
from model.feedforward import activate
from model.moe import MoE

D, F_WIDTH, E = 12, 20, 5
ROUTERS: list[RouterConfig] = [
    TopKRouter(),
    TopKRouter(k=1, renormalise=False),
    TopKRouter(k=3, capacity=CapacityConfig(factor=0.6)),
    ExpertChoiceRouter(allow_noncausal=True),
]
EXPERTS = [FeedForwardConfig(width=F_WIDTH, activation="relu", gated=False), FeedForwardConfig(width=F_WIDTH)]


def make_moe(router: RouterConfig, expert: FeedForwardConfig, dtype: torch.dtype = torch.float32) -> MoE:
    torch.manual_seed(0)
    moe = MoE(D, MoEConfig(num_experts=E, expert=expert, router=router))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return moe.to(dtype)


def token_by_token(moe: MoE, x_BSD: Tensor) -> Tensor:
    """Each token through each of its kept experts, one product at a time."""
    routing = moe.router(x_BSD)
    outs = []
    for token, x in enumerate(x_BSD.flatten(0, 1)):
        y = torch.zeros_like(x)
        for choice, expert in enumerate(routing.expert_TK[token].tolist()):
            if routing.kept_TK is not None and not routing.kept_TK[token, choice]:
                continue
            hidden = moe.experts.up[expert] @ x
            kind = moe.experts.config.activation
            if moe.experts.gate is None:
                hidden = activate(hidden, kind)
            else:
                hidden = activate(moe.experts.gate[expert] @ x, kind) * hidden
            y = y + routing.weight_TK[token, choice].to(x.dtype) * (moe.experts.down[expert] @ hidden)
        outs.append(y)
    return torch.stack(outs).view_as(x_BSD)


@pytest.mark.parametrize("expert", EXPERTS, ids=["relu", "geglu"])
@pytest.mark.parametrize("router", ROUTERS, ids=["top2", "switch", "dropping", "expert_choice"])
def test_layer_equals_token_by_token(router: RouterConfig, expert: FeedForwardConfig) -> None:
    moe = make_moe(router, expert)
    x = torch.randn(2, 8, D, requires_grad=True)
    direction = torch.randn(2, 8, D)
    slow = token_by_token(moe, x)
    wanted = torch.autograd.grad((slow * direction).sum(), [x, *moe.parameters()], allow_unused=True)
    fast, _, report = moe(x)
    found = torch.autograd.grad((fast * direction).sum(), [x, *moe.parameters()], allow_unused=True)
    # float32 sums in another order
    torch.testing.assert_close(fast, slow, rtol=1e-5, atol=1e-5)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    kept = report.num_choices if not hasattr(router, "capacity") or router.capacity is None else None
    if kept and router.kind == "topk":
        assert report.load_E.sum() == kept


@pytest.mark.parametrize("counts", [[3, 0, 5, 1, 4], [0, 0, 13, 0, 0], [13, 0, 0, 0, 0], [0, 0, 0, 0, 13]])
@pytest.mark.parametrize(("kind", "gated"), [("gelu", False), ("relu", False), ("gelu", True), ("silu", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_product_equals_the_loop(counts: list[int], kind: str, gated: bool, dtype: torch.dtype) -> None:
    """Experts without a row, too: their gradients must be zero, not uninitialised."""
    torch.manual_seed(1)
    shapes = [(13, 16), (E, 24, 16), (E, 24, 16), (E, 16, 24)]  # grouped products want 16-byte rows
    rows, gate, up, down = (torch.randn(s, dtype=dtype, requires_grad=True) for s in shapes)
    tensors = [rows, gate, up, down] if gated else [rows, up, down]
    direction = torch.randn(13, 16, dtype=dtype)
    results = []
    for apply in (experts_by_loop, experts_by_grouped_product):
        out = apply(rows, torch.tensor(counts), gate if gated else None, up, down, kind)
        results.append([out, *torch.autograd.grad((out * direction).sum(), tensors)])
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 0.5}
    for slow, fast in zip(*results):
        torch.testing.assert_close(fast, slow, **tolerance)


@pytest.mark.parametrize("router", ROUTERS, ids=["top2", "switch", "dropping", "expert_choice"])
def test_gradients_against_finite_differences(router: RouterConfig) -> None:
    moe = make_moe(router, EXPERTS[1], torch.float64)
    x = torch.randn(1, 5, D, dtype=torch.float64, requires_grad=True)

    def outputs(x: Tensor, *_: Tensor) -> Tensor:
        return moe(x)[0]

    # The router's own products are float32 by design, so only what follows them is checked to float64.
    moe.router.weight.requires_grad_(False)
    frozen = moe.router(x.detach())
    moe.router.forward = lambda _: frozen  # type: ignore[method-assign]
    assert torch.autograd.gradcheck(outputs, (x, *moe.experts.parameters()), atol=1e-6)


def test_gate_weights_get_their_gradient() -> None:
    """Against finite differences of the whole layer in the router weights (float32 router, so a wide step)."""
    moe = make_moe(TopKRouter(), EXPERTS[1])
    x = torch.randn(1, 6, D)
    moe(x)[0].sum().backward()
    assert moe.router.weight.grad is not None
    direction = torch.randn_like(moe.router.weight)
    step = 1e-3
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            moe.router.weight.add_(sign * step * direction)
            values.append(moe(x)[0].sum())
            moe.router.weight.sub_(sign * step * direction)
    slope = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(slope, (moe.router.weight.grad * direction).sum(), rtol=2e-2, atol=1e-2)


def test_ample_capacity_equals_dropless() -> None:
    x = torch.randn(2, 8, D)
    free = make_moe(TopKRouter(), EXPERTS[0])
    roomy = make_moe(TopKRouter(capacity=CapacityConfig(factor=E / 2)), EXPERTS[0])
    torch.testing.assert_close(roomy(x)[0], free(x)[0], rtol=0, atol=1e-5)


def test_widths_that_suit_no_grouped_product_take_the_loop() -> None:
    """Rows of 5 x 4 bytes, as three tensor ranks may leave them."""
    moe = MoE(8, MoEConfig(num_experts=2, expert=FeedForwardConfig(width=5, activation="relu", gated=False)))
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_()
    x = torch.randn(1, 6, 8, requires_grad=True)
    y, _, _ = moe(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad is not None and x.grad.isfinite().all()
