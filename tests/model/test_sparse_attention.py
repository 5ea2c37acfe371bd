"""Block-sparse kernels against the dense masked oracle, forward and gradients; the layer in the model; decoding."""

from __future__ import annotations

import shutil
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from configs.attention import (
    AttentionConfig,
    BigBirdLayout,
    EtcLayout,
    LayoutConfig,
    RelativeBias,
    Rotary,
    SparseConfig,
    WindowLayout,
)
from configs.model import FeedForwardConfig, ModelConfig
from model import flex_kernel, sparse_attention
from model.documents import DocumentReader, document_starts
from model.flex_kernel import FlexPlan, flex_attend, flex_plan
from model.glam import GLaM
from model.kv_cache import BlockCache
from model.patterns import block_layout
from model.position import RelativePositionBias
from model.sparse_attention import SparseAttention, dense_attention
from tests.model.sparse_cases import BLOCK, LAYOUTS, random_bias, random_heads, random_starts, spec_of
from tests.tiny import make_model, randomise_tables


def outcome(
    kernel: str, name: str, heads: tuple[Tensor, ...], biased: bool = False, start_BS: Tensor | None = None
) -> list[Tensor]:
    """Output and all gradients."""
    q, k, v, grad = heads
    bias = random_bias(q.shape[1], q.dtype) if biased else None
    attention = SparseAttention(spec_of(name, kernel), layer=3, num_groups=k.shape[1])
    y = attention(q, k, v, bias, start_BS)
    leaves = [q, k, v, *([] if bias is None else [bias.table])]
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(sorted(LAYOUTS)),
    kernel=st.sampled_from(["gathered", "chunked"]),
    length=st.integers(1, 20 * BLOCK),
    batch=st.integers(1, 2),
    groups=st.integers(1, 2),
    share=st.integers(1, 2),
    biased=st.booleans(),
    documents=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_kernels_equal_the_oracle(
    name: str, kernel: str, length: int, batch: int, groups: int, share: int, biased: bool, documents: bool, seed: int
) -> None:
    assume(not (biased and name == "etc of whole blocks"))  # its window is too short for a bias: refused
    heads = random_heads(batch, groups, share, length, 8, torch.float32, seed)
    start = random_starts(batch, length, torch.Generator().manual_seed(seed)) if documents else None
    for found, wanted in zip(outcome(kernel, name, heads, biased, start), outcome("dense", name, heads, biased, start)):
        assert (found - wanted).abs().max() <= 1e-5 * max(1.0, wanted.abs().max())


@pytest.mark.parametrize("name", LAYOUTS)
def test_gathered_and_chunked_are_equal_to_the_bit(name: str) -> None:
    """They differ in what they keep, not in what they compute."""
    heads = random_heads(2, 2, 2, 150, 8, torch.float32)
    for kept, recomputed in zip(outcome("gathered", name, heads), outcome("chunked", name, heads)):
        assert torch.equal(kept, recomputed)


@pytest.mark.parametrize("kernel", ["gathered", "chunked"])
@pytest.mark.parametrize("name", ["bigbird", "etc"])
def test_gradients_by_finite_differences(name: str, kernel: str) -> None:
    q, k, v, _ = random_heads(1, 1, 2, 3 * BLOCK + 5, 2, torch.float64)
    bias, start = random_bias(2, torch.float64), torch.zeros(1, 3 * BLOCK + 5, dtype=torch.int64)
    start[:, 21:] = 21
    attention = SparseAttention(spec_of(name, kernel), 0, 1)

    def f(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return attention(q, k, v, bias, start)

    assert torch.autograd.gradcheck(f, (q, k, v, bias.table), fast_mode=True)


@pytest.mark.parametrize("kernel", ["dense", "gathered", "chunked"])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", ["bigbird", "etc", "full"])
def test_bf16(name: str, biased: bool, kernel: str) -> None:
    """Against the float32 oracle on the same rounded inputs, by norm, as bf16 keeps 2^-8 of a number. Long enough that
    sums in bf16 (of a bias' gradient, of a sink's) would show."""
    heads = random_heads(1, 2, 1, 1500, 16, torch.bfloat16)
    start = random_starts(1, 1500, torch.Generator().manual_seed(1)) if name == "etc" else None
    wide = tuple(x.detach().float().requires_grad_() for x in heads)
    exact = outcome("dense", name, wide, biased, start)
    for found, wanted in zip(outcome(kernel, name, heads, biased, start), exact):
        assert (found.float() - wanted).norm() <= 2e-2 * wanted.norm()


@pytest.mark.parametrize("kernel", ["dense", "gathered", "chunked"])
def test_a_window_as_long_as_the_sequence_is_full_causal_attention(kernel: str) -> None:
    q, k, v, _ = random_heads(2, 2, 1, 5 * BLOCK, 8, torch.float32)
    spec = SparseConfig.model_validate({"layout": WindowLayout(window=5), "block_size": BLOCK, "kernel": kernel})
    wanted = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(SparseAttention(spec, 0, 2)(q, k, v), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["gathered", "chunked"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_later_token_changes_nothing_before_it_to_the_bit(name: str, kernel: str) -> None:
    q, k, v, _ = random_heads(1, 2, 1, 200, 8, torch.float32)
    attention = SparseAttention(spec_of(name, kernel), 0, 2)
    before = attention(q, k, v)
    for t in (0, 16, 17, 100, 199):
        changed = [x.detach().clone() for x in (q, k, v)]
        for x in changed:
            x[:, :, t:] += 1
        assert torch.equal(attention(*changed)[:, :, :t], before[:, :, :t])


def test_auto_keeps_probabilities_only_while_they_are_small(monkeypatch: pytest.MonkeyPatch) -> None:
    q, _, _, _ = random_heads(1, 2, 1, 300, 8, torch.float32)
    attention = SparseAttention(spec_of("bigbird"), 0, 2)
    assert attention.kernel(q) == "gathered"
    monkeypatch.setattr(sparse_attention, "GATHERED_BYTES", attention.kept_bytes(q) - 1)
    assert attention.kernel(q) == "chunked"


# ---- FlexAttention's plan (the kernel itself needs a GPU) ------------------------------------------------------------
def shown_by(plan: FlexPlan, batch: int, heads: int, length: int) -> Tensor:
    """int [B, H, S, S]: how often the plan shows each key to each query, copies counted on their originals."""
    mask, keys = plan.mask, len(plan.key_position_T)
    padded, b = mask.seq_lengths[0], mask.BLOCK_SIZE[0]

    def dense(count: Tensor, index: Tensor) -> Tensor:
        listed = torch.arange(index.shape[3]) < count[..., None]
        rows = torch.zeros(*index.shape[:3], keys // b + 1, dtype=torch.bool)
        rows.scatter_(3, index.long().where(listed, keys // b), True)
        return rows[..., :-1].repeat_interleave(b, 2).repeat_interleave(b, 3)

    full, partial = dense(mask.full_kv_num_blocks, mask.full_kv_indices), dense(mask.kv_num_blocks, mask.kv_indices)
    assert not (full & partial).any()
    query, key = torch.arange(padded)[:, None], torch.arange(keys)[None]
    inside = torch.stack([mask.mask_mod(torch.tensor(n), torch.tensor(0), query, key) for n in range(batch)])[:, None]
    shown = (full | (partial & inside)).expand(batch, heads, -1, -1).int()
    position = torch.cat((torch.arange(padded), plan.extra)).where(plan.key_position_T < padded, padded)
    return torch.zeros(batch, heads, padded, padded + 1, dtype=torch.int).index_add_(3, position, shown)[
        :, :, :length, :length
    ]


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("length", [5, 181, 304])
@pytest.mark.parametrize("name", LAYOUTS)
def test_flex_plan_shows_each_visible_key_once(
    name: str, length: int, documents: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flex_kernel, "ROWS_A_COPY", 4)
    start = random_starts(2, length, torch.Generator().manual_seed(1)) if documents else None
    layout, position = block_layout(spec_of(name), 0, range(2), length), torch.arange(length)
    visible = layout.visible(position, position, start).expand(2, 2, -1, -1).repeat_interleave(2, 1)
    assert torch.equal(shown_by(flex_plan(layout, 4, start), 2, 4, length), visible.int())


def flex_cases() -> list[tuple[LayoutConfig, bool]]:
    return [
        (BigBirdLayout(sinks=1, window=2, random=2), False),
        (BigBirdLayout(sinks=1, window=2, random=2), True),
        (EtcLayout(window=2, segment_tokens=128, summary_tokens=3), True),
    ]


def flex_and_dense(layout: LayoutConfig, documents: bool, dtype: torch.dtype, device: str, block: int = 64) -> Any:
    """(what a GPU would run, the oracle, inputs, their leaves)."""
    q, k, v, grad = (x.detach().to(device).requires_grad_() for x in random_heads(2, 2, 2, 901, 32, dtype))
    bias = RelativePositionBias(4, RelativeBias(num_buckets=8, max_distance=64)).to(device)
    with torch.no_grad():
        bias.table.copy_(torch.randn(4, 8, generator=torch.Generator().manual_seed(1)))
    start = random_starts(2, 901, torch.Generator().manual_seed(1), mean=200).to(device) if documents else None
    made = block_layout(SparseConfig(layout=layout, block_size=block), 0, range(2), 901).to(device)
    plan = flex_plan(made, 4, start)
    assert plan.safe == (not documents and layout.kind != "etc")
    return (
        lambda: flex_attend(q, k, v, plan, bias),
        lambda: dense_attention(q, k, v, made, bias, start),
        (q, k, v, bias.table),
        grad,
    )


@torch.no_grad()
@pytest.mark.skipif(shutil.which("g++") is None, reason="FlexAttention is compiled")
@pytest.mark.parametrize("case", range(2))
def test_flex_forward_on_a_cpu(case: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel itself, with its block lists; its backward pass needs a GPU."""
    monkeypatch.setattr(flex_kernel, "ROWS_A_COPY", 4)
    flex, dense, _, _ = flex_and_dense(*flex_cases()[case], torch.float32, "cpu")
    torch.testing.assert_close(flex(), dense(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's backward pass needs a GPU")
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("case", range(3))
def test_flex_on_a_gpu(case: int, dtype: torch.dtype, tolerance: float, block: int) -> None:
    flex, dense, leaves, grad = flex_and_dense(*flex_cases()[case], dtype, "cuda", block)
    found, wanted = flex(), dense()
    pairs = zip(torch.autograd.grad(found, leaves, grad), torch.autograd.grad(wanted, leaves, grad))
    for a, b in [(found, wanted), *pairs]:
        assert (a.float() - b.float()).norm() <= tolerance * b.float().norm()


# ---- in the model ----------------------------------------------------------------------------------------------------
def sparse_model(name: str, pattern: str = "SSF", rotary: bool = False, document_end: int | None = None) -> GLaM:
    spec = spec_of(name).model_copy(update={"pattern": pattern})
    position = Rotary() if rotary else RelativeBias(num_buckets=8, max_distance=BLOCK)
    attention = AttentionConfig(
        num_heads=4, head_width=12, num_kv_heads=2, position=position, sparse=spec, document_end=document_end
    )
    config = ModelConfig(vocab_size=50, num_layers=3, width=32, attention=attention, ffn=FeedForwardConfig(width=48))
    model = make_model(config).eval()
    randomise_tables(model)
    return model


def parts_with_state(model: GLaM, token_BS: Tensor, sizes: list[int], horizon: int) -> Tensor:
    state = model.decoding_state(horizon)
    return torch.cat([model(part, state) for part in token_BS.split(sizes, dim=1)], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("document_end", [None, 7])
@pytest.mark.parametrize("rotary", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_decoding_equals_the_training_forward(name: str, rotary: bool, document_end: int | None) -> None:
    if name == "etc of whole blocks" and not rotary:
        name = "etc"  # its window of one block is too short for the bias: refused
    model = sparse_model(name, rotary=rotary, document_end=document_end)
    token_BS = torch.randint(0, 50, (2, 150), generator=torch.Generator().manual_seed(2))
    whole = model(token_BS)
    for sizes in ([150], [1] * 150, [40, 1, 1, 20, 33, 1, 54]):
        found = parts_with_state(model, token_BS, sizes, horizon=150)
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_cache_forgets_what_no_later_row_can_see() -> None:
    token_BS = torch.randint(0, 50, (1, 25 * BLOCK), generator=torch.Generator().manual_seed(2))

    def kept(name: str, horizon: int) -> list[int]:
        model = sparse_model(name, pattern="S", rotary=True)
        state, counts = model.decoding_state(horizon), []
        for part in token_BS.split(BLOCK, dim=1):
            model(part, state)
            counts.append(max(cache.kept for cache in state.layers if isinstance(cache, BlockCache)))
        return counts

    assert max(kept("window", 25 * BLOCK)) == BLOCK  # window of two blocks: one is left behind a full row
    assert kept("strided", 24 * BLOCK + 25 * BLOCK)[-1] <= (1 + 25 // 3) * BLOCK
    random = kept("bigbird", 25 * BLOCK)
    assert random[-1] == 0 and max(random) < 25 * BLOCK  # nothing comes after the last row
    assert all(b <= a + BLOCK for a, b in pairwise(random))


def test_a_cache_refuses_more_than_it_was_made_for() -> None:
    model = sparse_model("bigbird")
    with pytest.raises(ValueError, match="made for 32"):
        model(torch.zeros(1, 40, dtype=torch.int64), model.decoding_state(20))


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["S", "F"])
@pytest.mark.parametrize("name", ["bigbird", "window"])
def test_documents_do_not_see_each_other(name: str, pattern: str) -> None:
    """A document that starts on a block's edge has the logits it has alone."""
    model = sparse_model(name, pattern=pattern, document_end=7)
    generator = torch.Generator().manual_seed(4)
    one, two = (torch.randint(8, 50, (1, size), generator=generator) for size in (5 * BLOCK, 7 * BLOCK))
    one[:, -1] = 7
    torch.testing.assert_close(model(torch.cat((one, two), 1))[:, 5 * BLOCK :], model(two), rtol=1e-4, atol=1e-5)
    other = one.clone()
    other[:, 3] = 20
    changed, packed = model(torch.cat((other, two), 1)), model(torch.cat((one, two), 1))
    assert torch.equal(changed[:, 5 * BLOCK :], packed[:, 5 * BLOCK :])


def test_document_starts() -> None:
    tokens = torch.tensor([[5, 0, 5, 5, 0, 0, 5], [0, 5, 5, 5, 5, 5, 0]])
    starts = document_starts(tokens, 0)
    assert starts.tolist() == [[0, 0, 2, 2, 2, 5, 6], [0, 1, 1, 1, 1, 1, 1]]
    for sizes in ([1] * 7, [3, 4], [2, 3, 2]):
        reader = DocumentReader(0)
        assert torch.equal(torch.cat([reader.read(part) for part in tokens.split(sizes, dim=1)], 1), starts)


def test_layers_cannot_run_without_being_told_of_documents() -> None:
    model = sparse_model("bigbird", document_end=7)
    with pytest.raises(RuntimeError, match="expect"):
        model.blocks[0](torch.zeros(1, 32, 32))


def test_reach() -> None:
    """Spec 5.4: at 12 layers every earlier token reaches the last logit with random blocks; without, some do not."""
    layouts = ((BigBirdLayout(sinks=0, window=2, random=2), True), (WindowLayout(window=2), False))
    for layout, reached in layouts:
        spec = SparseConfig(layout=layout, block_size=BLOCK)
        config = ModelConfig(
            vocab_size=50, num_layers=12, width=16, ffn=FeedForwardConfig(width=16),
            attention=AttentionConfig(num_heads=4, head_width=8, position=Rotary(), sparse=spec),
        )  # fmt: skip
        model = make_model(config, dtype=torch.float64)
        x = torch.randn(1, 40 * BLOCK, 16, dtype=torch.float64, requires_grad=True)
        hidden = x
        for block in model.blocks:
            hidden = block(hidden)
        (grad,) = torch.autograd.grad(hidden[0, -1].sum(), x)
        assert bool((grad[0].abs().sum(-1) > 0).all()) == reached
