"""The whole model: structure, initial weights, recomputation, auxiliary losses, and its twin at Hugging Face."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from configs.model import ModelConfig
from configs.run import PRESETS, RunConfig
from model.glam import GLaM
from model.init import initial_value
from tests.tiny import make_model, randomise_tables, tiny_config, token_windows


def objective(model: GLaM, windows: torch.Tensor) -> torch.Tensor:
    hidden = windows[:, :-1]
    for layer in model.layers():
        hidden = layer(hidden)
    return model.loss(hidden, windows[:, 1:])


def gradients(model: GLaM) -> dict[str, torch.Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_first_layer_of_each_pair_holds_experts() -> None:
    model = make_model(tiny_config().model)
    assert list(model.moe_blocks()) == [0, 2]
    assert [block.ffn is None for block in model.blocks] == [True, False, True, False]
    assert not any("bias" in n and "table" not in n for n, _ in model.named_parameters())


def test_initial_loss_is_that_of_guessing() -> None:
    config = tiny_config()
    loss = objective(make_model(config.model), token_windows(config, 16))
    assert abs(loss.item() - torch.log(torch.tensor(64.0)).item()) < 0.8  # logits of unit variance add half a nat


def test_initial_experts_are_drawn_by_global_number() -> None:
    config = tiny_config().model
    name, shape = "blocks.0.moe.experts.up", (4, 40, 32)
    whole = initial_value(name, shape, config, seed=3)
    assert torch.equal(whole[2:], initial_value(name, shape, config, 3, (2, 0, 0), (2, 40, 32)))
    assert not torch.equal(whole[0], whole[1])
    assert not torch.equal(whole, initial_value(name, shape, config, seed=4))


@given(st.data())
def test_any_box_of_a_parameter_is_drawn_as_part_of_the_whole(data: st.DataObject) -> None:
    """However tensor and expert ranks cut it; 600 rows are three blocks of draws."""
    config = tiny_config().model
    name, shape = data.draw(st.sampled_from([("embed.weight", (600, 5)), ("blocks.0.moe.experts.up", (3, 300, 4))]))
    offset = tuple(data.draw(st.integers(0, size - 1)) for size in shape)
    part = tuple(data.draw(st.integers(1, size - start)) for size, start in zip(shape, offset))
    box = tuple(slice(start, start + size) for start, size in zip(offset, part))
    assert torch.equal(initial_value(name, shape, config, 3, offset, part), initial_value(name, shape, config, 3)[box])


def test_auxiliary_losses_enter_the_gradient_with_their_coefficients() -> None:
    config = tiny_config("model.moe.router.balance_coef=0.3", "model.moe.router.z_coef=0.2")
    windows = token_windows(config, 4)
    injected, added = make_model(config.model), make_model(config.model)
    objective(injected, windows).backward()
    x, total = windows[:, :-1], torch.zeros(())
    for layer in added.layers():
        if getattr(layer, "moe", None) is not None:
            x, aux, _ = layer._layers(x)
            total = total + aux
        else:
            x = layer(x)
    (added.loss(x, windows[:, 1:]) + total).backward()
    for name, gradient in gradients(added).items():
        torch.testing.assert_close(gradients(injected)[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_recomputation_changes_nothing() -> None:
    config = tiny_config()
    windows = token_windows(config, 4)
    kept, rebuilt = make_model(config.model), make_model(config.model)
    for block in rebuilt.blocks:
        block.recompute = True
    losses = [objective(model, windows) for model in (kept, rebuilt)]
    for loss in losses:
        loss.backward()
    assert torch.equal(losses[0], losses[1])
    for name, gradient in gradients(kept).items():
        assert torch.equal(gradients(rebuilt)[name], gradient), name
    for layer, block in kept.moe_blocks().items():  # a recomputed pass is not counted twice
        one, two = block.totals.take(), rebuilt.moe_blocks()[layer].totals.take()
        assert one is not None and two is not None and torch.equal(one, two)


def test_recomputation_keeps_the_routing_of_the_forward_pass() -> None:
    """Kernels may differ in the last bit the second time. Here the second pass is disturbed a lot, on purpose."""
    config = tiny_config()
    model = make_model(config.model)
    block = model.moe_blocks()[0]
    assert block.moe is not None
    block.recompute = True
    router, seen = block.moe.router, []

    def disturbed(x: torch.Tensor) -> object:
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(len(seen)))
        routing = type(router).forward(router, x + 5 * noise)
        seen.append(routing.expert_TK)
        return routing

    router.forward = disturbed  # type: ignore[method-assign]
    objective(model, token_windows(config, 4)).backward()
    assert len(seen) == 2 and torch.equal(seen[0], seen[1])


def test_dense_twin_has_no_router() -> None:
    model = make_model(tiny_config("model.moe=null").model)
    assert not any("router" in name for name, _ in model.named_parameters()) and not model.moe_blocks()


@pytest.mark.parametrize("tied", [True, False])
def test_output_weights(tied: bool) -> None:
    model = make_model(tiny_config(f"model.tied_embedding={str(tied).lower()}").model)
    assert (model.output_weight is model.embed.weight) == tied


def test_modern_preset_is_qwen3_moe() -> None:
    """The layout of configs/modern.yaml, small, against transformers' Qwen3-MoE with the same weights, in float32."""
    import transformers  # seconds, and for this test alone

    preset = RunConfig.load(PRESETS / "modern.yaml").model
    tree = preset.model_dump(mode="json") | {"vocab_size": 96, "num_layers": 4, "width": 64}
    tree["attention"] |= {"num_heads": 4, "num_kv_heads": 2, "head_width": 32}
    tree["ffn"]["width"], tree["moe"]["expert"]["width"], tree["moe"]["num_experts"] = 80, 48, 8
    tree["moe"]["router"]["k"] = 3
    config = ModelConfig.check(tree, "test")
    model = make_model(config).eval()
    randomise_tables(model)
    twin = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(
            vocab_size=96, hidden_size=64, intermediate_size=80, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, moe_intermediate_size=48, num_experts=8, num_experts_per_tok=3,
            norm_topk_prob=True, decoder_sparse_step=2, rope_theta=preset.attention.position.base,
            rope_parameters={"rope_type": "default", "rope_theta": preset.attention.position.base},
            rms_norm_eps=preset.norm_epsilon, tie_word_embeddings=False, attention_bias=False, hidden_act="silu",
        )
    ).eval()  # fmt: skip
    twin.load_state_dict(qwen_names(model), strict=True)
    tokens = torch.randint(0, 96, (2, 17))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), twin(tokens).logits, rtol=1e-4, atol=1e-4)


def qwen_names(model: GLaM) -> dict[str, torch.Tensor]:
    """Our parameters under the names of Qwen3-MoE in transformers 5 (experts stacked, gate above up)."""
    renames = {
        "attention_norm.scale": "input_layernorm.weight",
        "ffn_norm.scale": "post_attention_layernorm.weight",
        "attention.query.weight": "self_attn.q_proj.weight",
        "attention.key.weight": "self_attn.k_proj.weight",
        "attention.value.weight": "self_attn.v_proj.weight",
        "attention.out.weight": "self_attn.o_proj.weight",
        "attention.query_norm.scale": "self_attn.q_norm.weight",
        "attention.key_norm.scale": "self_attn.k_norm.weight",
        "ffn.gate_proj.weight": "mlp.gate_proj.weight",
        "ffn.in_proj.weight": "mlp.up_proj.weight",
        "ffn.out_proj.weight": "mlp.down_proj.weight",
        "moe.router.weight": "mlp.gate.weight",
        "moe.experts.down": "mlp.experts.down_proj",
    }
    assert model.head is not None
    out = {
        "model.embed_tokens.weight": model.embed.weight,
        "model.norm.weight": model.norm.scale,
        "lm_head.weight": model.head.weight,
    }
    for number, block in enumerate(model.blocks):
        parameters = dict(block.named_parameters())
        for ours, theirs in renames.items():
            if ours in parameters:
                out[f"model.layers.{number}.{theirs}"] = parameters[ours]
        if block.moe is not None and block.moe.experts.gate is not None:
            stacked = torch.cat((block.moe.experts.gate, block.moe.experts.up), dim=1)
            out[f"model.layers.{number}.mlp.experts.gate_up_proj"] = stacked
    return {name: tensor.detach() for name, tensor in out.items()}
