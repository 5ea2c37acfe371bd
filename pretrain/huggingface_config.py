"""Hugging Face's `config.json` and our ModelConfig, each from the other.

Their Qwen3 (dense) and Qwen3-MoE are our rotary, q/k-normalised, silu-gated decoders, weight for weight. What they do
not have is written under a name of our own, GLaM, which no library but this one reads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.model import ModelConfig

CONFIG_FILE = "config.json"
QWEN3, QWEN3_MOE, OWN = "Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "GLaM"
_MODEL_TYPES = {"qwen3": QWEN3, "qwen3_moe": QWEN3_MOE, "glam": OWN}
_ACTIVATIONS = {"silu": "silu", "swish": "silu", "relu": "relu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu"}
_ROPE_BASE = 10_000.0  # transformers', where a file does not say
_REMEDY = "this program has no such model; convert the folder there first, or choose another"
_MISSING = object()


# ---- ours to theirs -------------------------------------------------------------------------------------------------
def departures(m: ModelConfig) -> list[str]:
    """Settings that no stock architecture has; none: the model is Qwen3's or Qwen3-MoE's."""
    found = []
    if m.attention.position.kind != "rotary":
        found.append(f"attention.position.kind={m.attention.position.kind} (Qwen3: rotary)")
    if m.attention.sparse is not None:
        found.append("attention.sparse (Qwen3: every layer sees all of its past)")
    if not m.attention.qk_norm:
        found.append("attention.qk_norm=false (Qwen3: queries and keys are normalised)")
    feeds = {"moe.expert": m.moe.expert} if m.moe and m.num_moe_layers else {}
    if m.num_moe_layers < m.num_layers:
        feeds["ffn"] = m.ffn
    for name, feed in feeds.items():
        if feed.activation != "silu":
            found.append(f"{name}.activation={feed.activation} (Qwen3: silu)")
        if not feed.gated:
            found.append(f"{name}.gated=false (Qwen3: gated)")
    if m.moe and m.num_moe_layers:
        router = m.moe.router
        if router.kind != "topk":
            found.append(f"moe.router.kind={router.kind} (Qwen3-MoE: topk)")
        elif router.capacity is not None:
            found.append(f"moe.router.capacity.factor={router.capacity.factor:g} (Qwen3-MoE drops no choice)")
    return found


def architecture_of(m: ModelConfig) -> str:
    if departures(m):
        return OWN
    return QWEN3_MOE if m.num_moe_layers else QWEN3


def to_huggingface(m: ModelConfig, sequence_length: int, eos_id: int | None, dtype: str) -> dict[str, Any]:
    """The tree of config.json, for transformers 4 (rope_theta) and 5 (rope_parameters)."""
    architecture = architecture_of(m)
    tree: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": next(kind for kind, name in _MODEL_TYPES.items() if name == architecture),
        "vocab_size": m.vocab_size,
        "max_position_embeddings": sequence_length,
        "bos_token_id": None,
        "eos_token_id": eos_id,
        "tie_word_embeddings": m.tied_embedding,
        "torch_dtype": dtype,
    }
    if architecture == OWN:
        return {**tree, "model": m.model_dump(mode="json")}
    assert m.attention.position.kind == "rotary"
    base = m.attention.position.base
    tree |= {
        "hidden_size": m.width,
        "intermediate_size": m.ffn.width,
        "num_hidden_layers": m.num_layers,
        "num_attention_heads": m.attention.num_heads,
        "num_key_value_heads": m.attention.kv_heads,
        "head_dim": m.attention.head_width,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "rms_norm_eps": m.norm_epsilon,
        "rope_theta": base,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": base},
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": m.num_layers,
        "initializer_range": m.width**-0.5,
        "use_cache": True,
    }
    return {**tree, **_experts_to_huggingface(m)} if architecture == QWEN3_MOE else tree


def _experts_to_huggingface(m: ModelConfig) -> dict[str, Any]:
    assert m.moe is not None and m.moe.router.kind == "topk"
    # Theirs: layer i holds experts if (i + 1) % decoder_sparse_step == 0 and it is none of mlp_only_layers.
    by_step = m.moe.offset == m.moe.every - 1
    return {
        "decoder_sparse_step": m.moe.every if by_step else 1,
        "mlp_only_layers": [] if by_step else [n for n in range(m.num_layers) if not m.is_moe(n)],
        "num_experts": m.moe.num_experts,
        "num_experts_per_tok": m.moe.router.k,
        "moe_intermediate_size": m.moe.expert.width,
        "norm_topk_prob": m.moe.router.renormalise,
        "output_router_logits": False,
        "router_aux_loss_coef": m.moe.router.balance_coef,
    }


# ---- theirs to ours -------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class TheirModel:
    """What a config.json says, in our terms."""

    architecture: str
    model: ModelConfig
    sequence_length: int


class _Settings:
    """The keys of one config.json; what is wrong with one is told with its value."""

    def __init__(self, file: Path, tree: dict[str, Any]) -> None:
        self.file, self.tree = file, tree

    def refused(self, key: str, expected: str, remedy: str = _REMEDY) -> UserError:
        return UserError(f"{self.file}: {key}={json.dumps(self.tree.get(key))}", expected, remedy)

    def integer(self, key: str, default: Any = _MISSING) -> int:
        value = self.tree.get(key, default)
        if value is _MISSING or type(value) is not int:
            raise self.refused(key, "a whole number", "mend config.json, or fetch the folder again")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.tree.get(key, default)
        if type(value) not in (int, float):
            raise self.refused(key, "a number", "mend config.json, or fetch the folder again")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.tree.get(key, default)
        if type(value) is not bool:
            raise self.refused(key, "true or false", "mend config.json, or fetch the folder again")
        return value


def from_huggingface(folder: Path) -> TheirModel:
    """Read config.json.

    Raises:
        UserError: a model that ours cannot be, naming the key; or no such file.
    """
    file = folder / CONFIG_FILE
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        remedy = "name a folder made by save_pretrained or fetched from a hub"
        raise UserError(f"{file}: {error}", "a config.json of Hugging Face", remedy) from None
    if not isinstance(tree, dict):
        raise UserError(f"{file} holds {type(tree).__name__}", "a JSON object", "fetch the folder again")
    c = _Settings(file, tree)
    kind = c.tree.get("model_type")
    architecture = _MODEL_TYPES.get(kind) if isinstance(kind, str) else None
    if architecture is None:
        raise c.refused("model_type", f"one of {', '.join(_MODEL_TYPES)}")
    length = c.integer("max_position_embeddings", 32_768)
    if architecture == OWN:
        if not isinstance(tree.get("model"), dict):
            raise c.refused("model", "the model section as `glam checkpoint export` writes it", "export it again")
        return TheirModel(architecture, ModelConfig.check(tree["model"], where=f"{file}, model"), length)
    _refuse_what_ours_lacks(c, architecture)
    model = ModelConfig.check(_model_tree(c, architecture), where=f"{file} (in this program's terms)")
    return TheirModel(architecture, model, length)


def _refuse_what_ours_lacks(c: _Settings, architecture: str) -> None:
    if c.tree.get("quantization_config") is not None:
        raise c.refused("quantization_config", "weights that are not quantised", "fetch or make the unquantised folder")
    if c.flag("attention_bias", False):
        raise c.refused("attention_bias", "false: no layer here has a bias")
    if c.tree.get("hidden_act", "silu") not in _ACTIVATIONS:
        raise c.refused("hidden_act", f"one of {', '.join(_ACTIVATIONS)}")
    if c.tree.get("partial_rotary_factor") not in (None, 1):
        raise c.refused("partial_rotary_factor", "1: whole heads are rotated")
    if c.flag("use_sliding_window", False) and c.tree.get("sliding_window", 4096) is not None:
        # Their dense model slides from layer max_window_layers on, their sparse one everywhere.
        first = c.integer("max_window_layers", 28) if architecture == QWEN3 else 0
        if first < c.integer("num_hidden_layers"):
            raise c.refused("sliding_window", "null, or use_sliding_window=false: attention here sees all that was")
    kinds = c.tree.get("layer_types") or []
    if set(kinds) - {"full_attention"}:
        raise c.refused("layer_types", "full_attention in all layers")


def _rope_base(c: _Settings) -> float:
    bases = {float(c.number("rope_theta", _ROPE_BASE))} if "rope_theta" in c.tree else set()
    for key in ("rope_scaling", "rope_parameters"):
        rope = c.tree.get(key)
        if rope is None:
            continue
        scaled = not isinstance(rope, dict) or rope.get("rope_type", rope.get("type", "default")) != "default"
        if (
            scaled
            or rope.get("partial_rotary_factor") not in (None, 1)
            or any(isinstance(v, dict) for v in rope.values())
        ):
            raise c.refused(key, "null, or rope_type=default: positions are not scaled here")
        if "rope_theta" in rope:
            bases.add(_Settings(c.file, rope).number("rope_theta", _ROPE_BASE))
    if len(bases) > 1:
        found = f"{c.file}: rope_theta is {' and '.join(f'{base:g}' for base in sorted(bases))}"
        raise UserError(found, "one value", "mend config.json, or fetch the folder again")
    return bases.pop() if bases else _ROPE_BASE


def _model_tree(c: _Settings, architecture: str) -> dict[str, Any]:
    activation = _ACTIVATIONS[c.tree.get("hidden_act", "silu")]
    heads, width = c.integer("num_attention_heads"), c.integer("hidden_size")
    kv_heads = heads if c.tree.get("num_key_value_heads", 0) is None else c.integer("num_key_value_heads")
    head_width = 128 if architecture == QWEN3 else width // max(1, heads)
    if c.tree.get("head_dim") is not None or architecture == QWEN3:
        head_width = c.integer("head_dim", head_width)
    return {
        "vocab_size": c.integer("vocab_size"),
        "num_layers": c.integer("num_hidden_layers"),
        "width": width,
        "attention": {
            "num_heads": heads,
            "head_width": head_width,
            "num_kv_heads": None if kv_heads == heads else kv_heads,
            "qk_norm": True,
            "position": {"kind": "rotary", "base": _rope_base(c)},
        },
        "ffn": {"width": c.integer("intermediate_size"), "activation": activation, "gated": True},
        "moe": _moe_tree(c, activation) if architecture == QWEN3_MOE else None,
        "tied_embedding": c.flag("tie_word_embeddings", False),
        "norm_epsilon": c.number("rms_norm_eps", 1e-6),
    }


def _moe_tree(c: _Settings, activation: str) -> dict[str, Any] | None:
    layers, step, dense = (
        c.integer("num_hidden_layers"),
        c.integer("decoder_sparse_step", 1),
        c.tree.get("mlp_only_layers"),
    )
    if step < 1:
        raise c.refused("decoder_sparse_step", "at least 1", "mend config.json")
    sparse = [n for n in range(layers) if (n + 1) % step == 0 and n not in (dense or [])]
    count = "num_experts" if "num_experts" in c.tree else "num_local_experts"  # transformers 4's name, and 5's
    if not sparse or c.integer(count) == 0:
        return None
    every, offset = _evenly_spaced(c, sparse, layers, step)
    return {
        "num_experts": c.integer(count),
        "expert": {"width": c.integer("moe_intermediate_size"), "activation": activation, "gated": True},
        "every": every,
        "offset": offset,
        "router": {
            "kind": "topk",
            "k": c.integer("num_experts_per_tok"),
            "renormalise": c.flag("norm_topk_prob", False),
            "balance_coef": c.number("router_aux_loss_coef", 0.001),
        },
    }


def _evenly_spaced(c: _Settings, sparse: list[int], layers: int, step: int) -> tuple[int, int]:
    """(every, offset) of layers that hold experts."""
    choices = [(step, step - 1), *((every, offset) for every in range(1, layers + 1) for offset in range(every))]
    for every, offset in choices:
        if sparse == [n for n in range(layers) if n % every == offset]:
            return every, offset
    raise UserError(
        f"{c.file}: decoder_sparse_step={step}, mlp_only_layers={json.dumps(c.tree.get('mlp_only_layers'))}: experts "
        f"in layers {', '.join(map(str, sparse))} of {layers}",
        "experts in every n-th layer, whichever is the first",
        _REMEDY,
    )
