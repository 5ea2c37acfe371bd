"""Attention and positions against direct computations; causality; the key-value cache."""

from __future__ import annotations

import math

import pytest
import torch

from configs.attention import AttentionConfig, RelativeBias, Rotary
from configs.model import FeedForwardConfig, ModelConfig, MoEConfig
from model.attention import Attention
from model.position import relative_bucket, rotate
from tests.tiny import make_model, randomise_tables

VARIANTS = {
    "relative": AttentionConfig(num_heads=4, head_width=12, position=RelativeBias(num_buckets=8, max_distance=16)),
    "rotary": AttentionConfig(num_heads=4, head_width=12, position=Rotary()),
    "grouped": AttentionConfig(num_heads=4, head_width=12, num_kv_heads=2, qk_norm=True, position=Rotary(base=100.0)),
}


def config_with(attention: AttentionConfig) -> ModelConfig:
    return ModelConfig(
        vocab_size=50,
        num_layers=2,
        width=32,
        attention=attention,
        ffn=FeedForwardConfig(width=48),
        moe=MoEConfig(num_experts=4, expert=FeedForwardConfig(width=40)),
    )


def direct_attention(layer: Attention, x: torch.Tensor) -> torch.Tensor:
    """One query at a time, one head at a time."""
    S = x.shape[1]
    heads = {name: getattr(layer, name)(x)[0].view(S, -1, layer.head_width) for name in ("query", "key", "value")}
    if layer.query_norm is not None and layer.key_norm is not None:
        heads["query"], heads["key"] = layer.query_norm(heads["query"]), layer.key_norm(heads["key"])
    if isinstance(layer.position, Rotary):
        for name in ("query", "key"):
            heads[name] = rotate(heads[name].transpose(0, 1)[None], layer.position.base, 0)[0].transpose(0, 1)
    num_heads, share = heads["query"].shape[1], heads["query"].shape[1] // heads["key"].shape[1]
    out = torch.zeros(S, num_heads, layer.head_width)
    for i in range(S):
        for h in range(num_heads):
            scores = heads["key"][: i + 1, h // share] @ heads["query"][i, h] / math.sqrt(layer.head_width)
            if layer.bias is not None:
                spec = layer.bias.config
                buckets = relative_bucket(i - torch.arange(i + 1), spec.num_buckets, spec.max_distance)
                scores = scores + layer.bias.table[h, buckets]
            out[i, h] = scores.softmax(0) @ heads["value"][: i + 1, h // share]
    return layer.out(out.flatten(1))[None]


@pytest.mark.parametrize("variant", VARIANTS)
def test_attention_equals_direct_computation(variant: str) -> None:
    model = make_model(config_with(VARIANTS[variant]))
    randomise_tables(model)
    layer = model.blocks[1].attention
    x = torch.randn(1, 24, 32)
    torch.testing.assert_close(layer(x), direct_attention(layer, x), rtol=1e-4, atol=1e-5)


def test_buckets_are_exact_near_and_logarithmic_far() -> None:
    buckets = relative_bucket(torch.arange(400), 32, 128)
    assert buckets[:16].tolist() == list(range(16))
    assert (buckets.diff() >= 0).all() and buckets[128:].unique().tolist() == [31]


def test_rotation_depends_on_distance_alone() -> None:
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
    product = [(rotate(q, 1e4, at) * rotate(k, 1e4, at - 3)).sum() for at in (3, 40, 400)]
    torch.testing.assert_close(product[0], product[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(product[0], product[2], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rotate(q, 1e4, 7).norm(), q.norm())


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_later_token_changes_no_earlier_logit(variant: str) -> None:
    model = make_model(config_with(VARIANTS[variant])).eval()
    randomise_tables(model)
    tokens = torch.randint(0, 50, (1, 20))
    before = model(tokens)
    for t in (0, 7, 19):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 1) % 50
        after = model(changed)
        # Not bit-equal: an expert's product has other rows beside it. Nothing of the changed token is among them.
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=0, atol=1e-5)
        assert not torch.allclose(after[:, t:], before[:, t:], atol=1e-3)


@pytest.mark.parametrize("steps", [[20], [1] * 20, [5, 1, 1, 6, 7]], ids=["at once", "one by one", "mixed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_with_a_cache_equal_those_without(variant: str, steps: list[int]) -> None:
    model = make_model(config_with(VARIANTS[variant])).eval()
    randomise_tables(model)
    tokens = torch.randint(0, 50, (2, 20))
    with torch.no_grad():
        whole = model(tokens)
        state = model.decoding_state(20)
        parts = [model(part, state) for part in tokens.split(steps, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-5)
    assert state.length == 20
