"""Routers against a token-by-token loop, and what the papers say of their losses.

B sequences, S tokens each, E experts, K choices.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.model import CapacityConfig, ExpertChoiceRouter, FeedForwardConfig, MoEConfig, NoisyTopKRouter, TopKRouter
from model.router import Router, Routing, expert_capacity, route_expert_choice, route_noisy_top_k, route_top_k

ZERO = torch.zeros(())
SHAPES = st.tuples(st.integers(1, 3), st.sampled_from([1, 4, 8, 12]), st.integers(2, 6), st.integers(1, 2))


def draw_logits(shape: tuple[int, int, int], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2


def loop_routing(logits_BSE: Tensor, spec: TopKRouter) -> dict[tuple[int, int], float]:
    """(token, expert) -> weight of what is kept, in plain Python: first choices of a group before second ones."""
    B, S, E = logits_BSE.shape
    group = spec.capacity.group_tokens or S if spec.capacity else S
    slots = math.ceil(spec.k * group / E * spec.capacity.factor - 1e-9) if spec.capacity else S * B
    kept = {}
    for first in range(0, B * S, group):
        used = [0] * E
        for choice in range(spec.k):
            for token in range(first, first + group):
                probs = logits_BSE.reshape(-1, E)[token].double().softmax(0).tolist()
                best = sorted(range(E), key=lambda e: -probs[e])[: spec.k]
                total = sum(probs[e] for e in best) if spec.renormalise else 1.0
                expert = best[choice]
                if used[expert] < slots:
                    kept[token, expert] = probs[expert] / total
                used[expert] += 1
    return kept


def as_dict(routing: Routing) -> dict[tuple[int, int], float]:
    kept = torch.ones_like(routing.expert_TK, dtype=torch.bool) if routing.kept_TK is None else routing.kept_TK
    return {(t, int(routing.expert_TK[t, k])): float(routing.weight_TK[t, k]) for t, k in kept.nonzero().tolist()}


@settings(max_examples=40, deadline=None)
@given(
    SHAPES,
    st.integers(0, 2**20),
    st.booleans(),
    st.one_of(st.none(), st.floats(0.25, 2.0)),
    st.booleans(),
)
def test_top_k_equals_a_loop_over_tokens(
    shape: tuple[int, int, int, int], seed: int, renormalise: bool, factor: float | None, halves: bool
) -> None:
    B, S, E, k = shape
    group = S // 2 if halves and S % 2 == 0 else None
    capacity = CapacityConfig(factor=factor, group_tokens=group) if factor else None
    spec = TopKRouter(k=k, renormalise=renormalise, capacity=capacity)
    logits = draw_logits((B, S, E), seed)
    found, expected = as_dict(route_top_k(logits, spec, ZERO)), loop_routing(logits, spec)
    assert found.keys() == expected.keys()
    assert all(abs(found[key] - expected[key]) <= 1e-6 for key in expected)


@given(SHAPES, st.integers(0, 2**20))
@settings(max_examples=20, deadline=None)
def test_invariants(shape: tuple[int, int, int, int], seed: int) -> None:
    B, S, E, k = shape
    routing = route_top_k(draw_logits((B, S, E), seed), TopKRouter(k=k, capacity=CapacityConfig(factor=1.0)), ZERO)
    assert routing.kept_TK is not None
    assert all(len(set(row)) == k for row in routing.expert_TK.tolist())  # k different experts a token
    assert ((routing.weight_TK >= 0) & (routing.weight_TK <= 1)).all()
    assert (routing.weight_TK[~routing.kept_TK] == 0).all()
    whole = routing.kept_TK.all(1)
    torch.testing.assert_close(routing.weight_TK[whole].sum(1), torch.ones(int(whole.sum())))
    slots = expert_capacity(CapacityConfig(factor=1.0), S, E, k)
    for sequence in range(B):
        rows = slice(sequence * S, (sequence + 1) * S)
        load = torch.bincount(routing.expert_TK[rows][routing.kept_TK[rows]], minlength=E)
        assert load.max() <= slots


def test_capacity_of_the_whole_group_drops_nothing() -> None:
    logits = draw_logits((2, 16, 4), 3)
    free = route_top_k(logits, TopKRouter(), ZERO)
    roomy = route_top_k(logits, TopKRouter(capacity=CapacityConfig(factor=2.0)), ZERO)  # ceil(2*16/4*2) = 16 slots
    assert roomy.kept_TK is not None and roomy.kept_TK.all()
    assert torch.equal(free.weight_TK, roomy.weight_TK) and torch.equal(free.expert_TK, roomy.expert_TK)


def test_capacity_counts_within_a_sequence_whatever_the_batch() -> None:
    logits = draw_logits((4, 8, 4), 4)
    spec = TopKRouter(capacity=CapacityConfig(factor=0.75))
    together = route_top_k(logits, spec, ZERO)
    alone = [route_top_k(logits[b : b + 1], spec, ZERO) for b in range(4)]
    assert together.kept_TK is not None and not together.kept_TK.all()
    assert torch.equal(together.kept_TK, torch.cat([r.kept_TK for r in alone if r.kept_TK is not None]))
    torch.testing.assert_close(together.balance_loss, torch.stack([r.balance_loss for r in alone]).mean())


def test_balance_loss_is_one_at_balance_and_num_experts_at_collapse() -> None:
    E = 8
    balanced = torch.eye(E).repeat(2, 1)[None] * 50.0  # each expert is first choice of as many tokens
    assert route_top_k(balanced, TopKRouter(k=1), ZERO).balance_loss.item() == pytest.approx(1.0, abs=1e-5)
    collapsed = torch.zeros(1, 16, E)
    collapsed[..., 3] = 50.0
    assert route_top_k(collapsed, TopKRouter(k=1), ZERO).balance_loss.item() == pytest.approx(E, abs=1e-4)


def test_z_loss_at_zero_logits() -> None:
    moe = MoEConfig(num_experts=64, expert=FeedForwardConfig(width=4))
    router = Router(8, moe)
    torch.nn.init.zeros_(router.weight)
    assert router(torch.randn(1, 4, 8)).z_loss.item() == pytest.approx(math.log(64) ** 2, rel=1e-6)  # 17.296


def test_router_works_in_float32_under_bf16_weights() -> None:
    moe = MoEConfig(num_experts=4, expert=FeedForwardConfig(width=4))
    router = Router(8, moe)
    torch.nn.init.normal_(router.weight)
    router.bfloat16()
    x = torch.randn(1, 5, 8).bfloat16()
    exact = route_top_k(x.double() @ router.weight.double().T, TopKRouter(), ZERO)
    torch.testing.assert_close(router(x).weight_TK.double(), exact.weight_TK, rtol=0, atol=1e-6)


def test_noisy_router_is_exact_without_noise_and_explores_with_it() -> None:
    moe = MoEConfig(num_experts=8, expert=FeedForwardConfig(width=4), router=NoisyTopKRouter())
    router = Router(16, moe)
    torch.nn.init.normal_(router.weight, std=0.1)
    assert router.noise_weight is not None
    torch.nn.init.zeros_(router.noise_weight)
    x = torch.randn(1, 64, 16)
    router.eval()
    quiet = router(x)
    logits = x @ router.weight.T
    torch.testing.assert_close(quiet.weight_TK, logits[0].topk(2).values.softmax(-1))
    assert torch.equal(router(x).expert_TK, quiet.expert_TK)
    router.train()
    assert not torch.equal(router(x).expert_TK, quiet.expert_TK)
    router(x).balance_loss.backward()
    assert router.weight.grad is not None and router.weight.grad.abs().sum() > 0
    assert router.noise_weight.grad is not None and router.noise_weight.grad.abs().sum() > 0


def test_noisy_load_estimate_is_the_probability_of_being_chosen() -> None:
    """Shazeer's P(x, i) against the frequency over fresh noise for that expert alone: the sum over many draws."""
    logits, scale = torch.tensor([[[0.3, -0.2, 0.1, 0.0]]]), torch.full((1, 1, 4), 0.5)
    torch.manual_seed(0)
    spec = NoisyTopKRouter(k=2)
    draws = [route_noisy_top_k(logits, scale, spec, ZERO) for _ in range(2000)]
    frequency = torch.zeros(4)
    for draw in draws:
        frequency[draw.expert_TK[0]] += 1 / len(draws)
    assert frequency.argmax() == 0 and frequency.argmin() == 1
    assert all(math.isfinite(draw.balance_loss.item()) for draw in draws)


def test_expert_choice_fills_every_expert_equally() -> None:
    spec = ExpertChoiceRouter(allow_noncausal=True, capacity_factor=2.0)
    logits = draw_logits((3, 12, 4), 9)
    routing = route_expert_choice(logits, spec, ZERO)
    assert routing.kept_TK is not None
    assert (routing.kept_TK.view(3, 12, 4).sum(1) == 6).all()  # 12 / 4 * 2 tokens for each expert of each sequence
    probs = logits.softmax(-1).flatten(0, 1)
    torch.testing.assert_close(routing.weight_TK, probs * routing.kept_TK)
