"""What block-sparse attention keeps (plans between passes, tensors for the backward pass), which kernel it chooses, and
blocks that are recomputed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from configs.attention import AttentionConfig, Rotary, SparseConfig
from configs.model import FeedForwardConfig, ModelConfig, MoEConfig
from model import sparse_attention
from model.glam import GLaM
from model.sparse_attention import SparseAttention
from tests.model.sparse_cases import BLOCK, random_bias, random_heads, random_starts, spec_of
from tests.tiny import make_model


@pytest.mark.parametrize("name", ["bigbird", "etc"])
def test_one_layer_serves_other_lengths_batches_groups_and_documents_in_between(name: str) -> None:
    layer = SparseAttention(spec_of(name, "gathered"), 3, 4)
    for length, batch, groups, documents in (
        (150, 1, range(2), False),
        (150, 3, range(2), False),
        (150, 3, range(2), True),
        (150, 3, range(2), False),
        (150, 3, range(2, 4), False),
        (310, 1, range(2, 4), False),
        (150, 3, range(2, 4), True),
    ):
        q, k, v, _ = random_heads(batch, 2, 2, length, 8, torch.float32)
        for seed in (1, 2):
            start = random_starts(batch, length, torch.Generator().manual_seed(seed)) if documents else None
            fresh = SparseAttention(spec_of(name, "dense"), 3, 4)
            layer.groups = fresh.groups = groups
            wanted = fresh(q, k, v, None, start)
            torch.testing.assert_close(layer(q, k, v, None, start), wanted, rtol=1e-5, atol=1e-5)


def test_chunked_keeps_its_inputs_only_and_gathered_the_probabilities() -> None:
    def kept(kernel: str) -> int:
        q, k, v, _ = random_heads(2, 2, 2, 304, 8, torch.float32)
        bias, sizes = random_bias(4, torch.float32), list[int]()
        attention = SparseAttention(spec_of("bigbird", kernel), 0, 2)

        def pack(x: Tensor) -> Tensor:
            sizes.append(x.numel() * x.element_size())
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            tiles = bias.tiles(BLOCK)
            sizes.clear()
            made = attention._gather_plan(k, None)
            sparse_attention.block_kernel.attend(q, k, v, tiles, made, keep=kernel == "gathered")
        inputs = sum(x.numel() * x.element_size() for x in (q, k, v, tiles))
        return sum(sizes) - inputs

    q, _, _, _ = random_heads(2, 2, 2, 304, 8, torch.float32)
    attention = SparseAttention(spec_of("bigbird"), 0, 2)
    assert kept("chunked") == 0
    # Rows of few blocks share chunks with rows of more, and are filled up.
    assert attention.kept_bytes(q) <= kept("gathered") <= 1.3 * attention.kept_bytes(q)
    assert attention.kept_bytes(q) == 2 * attention.kept_bytes(q[:1])


def sparse_experts(kernel: str, document_end: int | None = None) -> GLaM:
    config = ModelConfig(
        vocab_size=50, num_layers=2, width=32, ffn=FeedForwardConfig(width=48),
        moe=MoEConfig(num_experts=4, expert=FeedForwardConfig(width=40)),
        attention=AttentionConfig(
            num_heads=4, head_width=8, position=Rotary(), document_end=document_end,
            sparse=SparseConfig.model_validate({"block_size": 64 if kernel == "flex" else BLOCK, "kernel": kernel}),
        ),
    )  # fmt: skip
    return make_model(config)


def gradients(model: GLaM, recompute: bool) -> list[Tensor]:
    for block in model.blocks:
        block.recompute = recompute  # type: ignore[assignment]
    model.zero_grad()
    token_BS = torch.randint(0, 50, (2, 600), generator=torch.Generator().manual_seed(1))
    model(token_BS).square().mean().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("document_end", [None, 7])
@pytest.mark.parametrize("kernel", ["gathered", "chunked", "flex"])
def test_recomputed_blocks_have_the_same_gradients(
    kernel: str, document_end: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts and recomputation: the router's choices are kept, and nothing else may be taken for them, in the first
    pass (which plans) and in later ones. flex: its plan is made as on a GPU, the kernel replaced by full attention."""
    if kernel == "flex":
        plain = torch.nn.functional.scaled_dot_product_attention
        monkeypatch.setattr(SparseAttention, "kernel", lambda *_: "flex")
        monkeypatch.setattr(sparse_attention, "flex_attend", lambda q, k, v, *_: plain(q, k, v, is_causal=True))
    model = sparse_experts(kernel, document_end)
    wanted = gradients(model, recompute=False)
    fresh = sparse_experts(kernel, document_end)
    for model in (fresh, fresh):
        for found, right in zip(gradients(model, recompute=True), wanted):
            assert torch.equal(found, right)


def test_flex_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it is refused in training, and another kernel does its work elsewhere."""
    q, k, v, _ = random_heads(1, 2, 1, 300, 8, torch.float32)
    attention = SparseAttention(spec_of("bigbird", "flex", 64), 0, 2)
    with pytest.raises(RuntimeError, match="kernel=flex trains on a GPU only"):
        attention(q, k, v)
    with torch.no_grad():
        oracle = SparseAttention(spec_of("bigbird", "dense", 64), 0, 2)
        torch.testing.assert_close(attention(q, k, v), oracle(q, k, v), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="blocks of 64 tokens at least, block_size=32"):
        spec_of("bigbird", "flex", 32)


def test_a_prompt_is_not_worth_compiling_for(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v, _ = random_heads(1, 2, 1, 300, 8, torch.float32)
    attention = SparseAttention(spec_of("bigbird", "flex", 64), 0, 2)
    monkeypatch.setattr(SparseAttention, "kernel", lambda *_: "flex")
    monkeypatch.setattr(sparse_attention, "flex_attend", lambda *_: pytest.fail("compiled"))
    attention(q, k, v, once=True)
