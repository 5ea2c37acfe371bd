"""The names of weights at Hugging Face's Qwen3 and Qwen3-MoE, beside ours.

Experts are stacked here, [E, F, D] and [E, D, F]; there each has names of its own on disk.
"""

from __future__ import annotations

from dataclasses import dataclass

from configs.model import ModelConfig
from pretrain.huggingface_config import OWN
from pretrain.weights import parameter_shapes

_WHOLE = {
    "embed.weight": "model.embed_tokens.weight",
    "norm.scale": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_BLOCK = {
    "attention_norm.scale": "input_layernorm.weight",
    "attention.query.weight": "self_attn.q_proj.weight",
    "attention.key.weight": "self_attn.k_proj.weight",
    "attention.value.weight": "self_attn.v_proj.weight",
    "attention.out.weight": "self_attn.o_proj.weight",
    "attention.query_norm.scale": "self_attn.q_norm.weight",
    "attention.key_norm.scale": "self_attn.k_norm.weight",
    "ffn_norm.scale": "post_attention_layernorm.weight",
    "ffn.gate_proj.weight": "mlp.gate_proj.weight",
    "ffn.in_proj.weight": "mlp.up_proj.weight",
    "ffn.out_proj.weight": "mlp.down_proj.weight",
    "moe.router.weight": "mlp.gate.weight",
}
_EXPERTS = {"moe.experts.gate": "gate_proj", "moe.experts.up": "up_proj", "moe.experts.down": "down_proj"}


@dataclass(frozen=True)
class Counterpart:
    """One of our parameters, and its tensors there."""

    ours: str
    shape: tuple[int, ...]  # of ours
    theirs: tuple[str, ...]  # one, or one for each expert of a stack
    per_expert: bool = False

    @property
    def their_shape(self) -> tuple[int, ...]:
        return self.shape[1:] if self.per_expert else self.shape


@dataclass(frozen=True)
class Stacked:
    """How some writers lay the experts of a layer: all in one tensor, gates above ups."""

    theirs: str
    shape: tuple[int, ...]
    first_row: int  # of the part that is meant
    num_rows: int


def counterparts(model: ModelConfig, architecture: str) -> list[Counterpart]:
    """Every parameter of a model, in its order."""
    return [_counterpart(name, shape, architecture) for name, shape in parameter_shapes(model).items()]


def _counterpart(name: str, shape: tuple[int, ...], architecture: str) -> Counterpart:
    if architecture == OWN:
        return Counterpart(name, shape, (name,))
    if name in _WHOLE:
        return Counterpart(name, shape, (_WHOLE[name],))
    _, layer, part = name.split(".", 2)
    prefix = f"model.layers.{layer}"
    if part in _BLOCK:
        return Counterpart(name, shape, (f"{prefix}.{_BLOCK[part]}",))
    projection = _EXPERTS[part]
    theirs = tuple(f"{prefix}.mlp.experts.{expert}.{projection}.weight" for expert in range(shape[0]))
    return Counterpart(name, shape, theirs, per_expert=True)


def stacked_form(counterpart: Counterpart) -> Stacked:
    """Where a stack of experts lies in a file that keeps them together."""
    prefix, _, rest = counterpart.theirs[0].partition(".experts.")
    projection = rest.split(".")[1]
    E, rows, columns = counterpart.shape
    if projection == "down_proj":
        return Stacked(f"{prefix}.experts.down_proj", counterpart.shape, 0, rows)
    first = rows if projection == "up_proj" else 0
    return Stacked(f"{prefix}.experts.gate_up_proj", (E, 2 * rows, columns), first, rows)
