"""Sampling: temperature, top-p, seeds; and decoding with a cache."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.model import ModelConfig
from model.glam import GLaM
from model.init import initial_value
from pretrain.generate import generate, sample, without_capacity


def draws(probs: list[float], temperature: float, top_p: float, count: int = 200, seed: int = 0) -> Counter[int]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.tensor(probs).log()
    return Counter(sample(logits, temperature, top_p, generator) for _ in range(count))


@given(st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=20), st.floats(0, 1))
def test_temperature_0_takes_the_most_probable(logits: list[float], top_p: float) -> None:
    chosen = sample(torch.tensor(logits), 0, top_p, torch.Generator())
    assert logits[chosen] == max(logits)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=8, unique=True), st.floats(0.01, 0.999))
def test_top_p_keeps_the_smallest_set_with_that_mass(weights: list[int], top_p: float) -> None:
    probs = [weight / sum(weights) for weight in weights]
    ranked = sorted(range(len(probs)), key=lambda i: -probs[i])
    nucleus, mass = set[int](), 0.0
    for index in ranked:
        if mass >= top_p - 1e-6:  # float32 sums in between may fall on either side
            break
        nucleus.add(index)
        mass += probs[index]
    assert draws(probs, 1.0, top_p).keys() <= nucleus


@pytest.mark.parametrize("top_p", [0.0, 1e-9, 0.3])
def test_a_small_top_p_leaves_the_most_probable(top_p: float) -> None:
    """The first always stays, as the code says, at 0 too."""
    assert draws([0.3, 0.5, 0.2], 1.0, top_p).keys() == {1}


@pytest.mark.parametrize("top_p", [1.0, 1.5])
def test_top_p_of_1_is_plain_sampling(top_p: float) -> None:
    """Frequencies within 5 standard errors."""
    probs, count = [0.5, 0.25, 0.15, 0.1], 4000
    found = draws(probs, 1.0, top_p, count)
    for token, p in enumerate(probs):
        assert abs(found[token] / count - p) < 5 * (p * (1 - p) / count) ** 0.5


def test_temperature_sharpens_and_flattens() -> None:
    shares = [draws([0.6, 0.4], temperature, 1.0, 2000)[0] / 2000 for temperature in (0.2, 1.0, 5.0)]
    for share, temperature in zip(shares, (0.2, 1.0, 5.0)):
        expected = 0.6 ** (1 / temperature) / (0.6 ** (1 / temperature) + 0.4 ** (1 / temperature))
        assert abs(share - expected) < 0.06
    assert shares[0] > shares[1] > shares[2]


def test_seed_decides() -> None:
    def sequence(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [sample(torch.zeros(100), 1.0, 0.9, generator) for _ in range(20)]

    assert sequence(1) == sequence(1) != sequence(2)


# ---- a whole model ----------------------------------------------------------------------------------------------
CAPACITY = {"kind": "topk", "capacity": {"factor": 1.0}}


def config_with(router: dict[str, object] | None = None) -> ModelConfig:
    moe = {"num_experts": 4, "expert": {"width": 16}, "router": router or {"kind": "topk"}}
    tree = {
        "vocab_size": 50, "num_layers": 2, "width": 16, "attention": {"num_heads": 2, "head_width": 8},
        "ffn": {"width": 16}, "moe": moe,
    }  # fmt: skip
    return ModelConfig.check(tree, where="test")


@pytest.fixture(scope="module")
def model() -> GLaM:
    config = config_with()
    with torch.device("meta"):
        built = GLaM(config)
    built.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            parameter.copy_(initial_value(name, tuple(parameter.shape), config, seed=3))
    return built


def test_greedy_decoding_with_a_cache_equals_recomputing(model: GLaM) -> None:
    prompt = [3, 14, 15, 9]
    found = list(generate(model, prompt, 12, temperature=0, top_p=1.0, eos_id=None, seed=0))
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(12):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert found == tokens[4:]


def test_generation_is_seeded_bounded_and_ends_at_eos(model: GLaM) -> None:
    def run(seed: int, max_tokens: int = 30, eos_id: int | None = None) -> list[int]:
        return list(generate(model, [1, 2], max_tokens, temperature=1.0, top_p=1.0, eos_id=eos_id, seed=seed))

    text = run(7)
    assert len(text) == 30 and all(0 <= token < 50 for token in text)
    assert text == run(7) != run(8)
    assert run(7, max_tokens=5) == text[:5] and run(7, max_tokens=0) == []
    assert run(7, eos_id=text[10]) == text[: text.index(text[10])]


def test_decoding_drops_nothing() -> None:
    """Capacity is a share of a whole sequence; without it the rest of the model stays as it was."""
    limited, free = config_with(CAPACITY), config_with()
    assert without_capacity(limited) == free and without_capacity(free) is free
    dense = free.model_copy(update={"moe": None})
    assert without_capacity(dense) is dense
