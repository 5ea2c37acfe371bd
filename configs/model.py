"""The model's shape: one dense or mixture-of-experts decoder (GLaM, arXiv:2112.06905; `modern` variants).

Counts are `num_`, sizes of tensors bear the name of the axis: width D, head_width N, ffn width F, vocab_size V.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from configs.attention import AttentionConfig
from configs.base import Strict

Activation = Literal["gelu", "relu", "silu"]  # gelu is the tanh form


class FeedForwardConfig(Strict):
    """`out(act(in(x)))`, or gated: `out(act(gate(x)) * in(x))`. No biases."""

    width: int = Field(gt=0)  # F
    activation: Activation = "gelu"
    gated: bool = True


class CapacityConfig(Strict):
    """Drop choices beyond `factor` x perfect balance within a routing group; None in the router means dropless.

    Capacity per expert = ceil(k * group tokens / num_experts * factor), so 1.0 is exact balance. A group is one
    sequence, or `group_tokens` of it, whatever the parallel layout. It leaks the future: a later token's first
    choice can push out an earlier token's second choice.
    """

    factor: float = Field(gt=0)
    group_tokens: int | None = Field(default=None, gt=0)


class TopKRouter(Strict):
    """Softmax over all experts, k largest (GShard, arXiv:2006.16668; Switch is k=1, renormalise=false)."""

    kind: Literal["topk"] = "topk"
    k: int = Field(default=2, ge=1)
    renormalise: bool = True  # gate weights of the chosen sum to 1
    capacity: CapacityConfig | None = None
    balance_coef: float = Field(default=0.01, ge=0)
    z_coef: float = Field(default=0.0, ge=0)


class NoisyTopKRouter(Strict):
    """Shazeer et al. 2017 (arXiv:1701.06538, sec. 2.1 and appendix A): noisy logits, softmax after the top k.

    The noise is drawn from each rank's generator, so that runs agree under one layout only.
    """

    kind: Literal["noisy_topk"] = "noisy_topk"
    k: int = Field(default=2, ge=1)
    capacity: CapacityConfig | None = None
    balance_coef: float = Field(default=0.1, ge=0)  # on importance and on load
    z_coef: float = Field(default=0.0, ge=0)


class ExpertChoiceRouter(Strict):
    """Each expert takes its top tokens of a sequence (arXiv:2202.09368). Not causal: later tokens decide."""

    kind: Literal["expert_choice"] = "expert_choice"
    capacity_factor: float = Field(default=2.0, gt=0)  # experts a token on average
    allow_noncausal: bool = False
    balance_coef: Literal[0] = 0  # balanced by construction
    z_coef: float = Field(default=0.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.allow_noncausal:
            raise ValueError(
                "expert_choice lets later tokens decide for earlier ones; set allow_noncausal=true if meant"
            )
        return self


RouterConfig = Annotated[TopKRouter | NoisyTopKRouter | ExpertChoiceRouter, Field(discriminator="kind")]


class MoEConfig(Strict):
    """Mixture-of-experts layers: layer i is one where i % every == offset (GLaM: the first of each pair)."""

    num_experts: int = Field(ge=1)  # E
    expert: FeedForwardConfig
    every: int = Field(default=2, ge=1)
    offset: int = Field(default=0, ge=0)
    router: RouterConfig = TopKRouter()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.offset >= self.every:
            raise ValueError(f"offset={self.offset} must be below every={self.every}")
        k = getattr(self.router, "k", 1)
        if k > self.num_experts:
            raise ValueError(f"router.k={k} exceeds num_experts={self.num_experts}")
        return self


class ModelConfig(Strict):
    """A pre-norm RMSNorm decoder without biases; `moe: null` is the dense twin."""

    vocab_size: int = Field(gt=0)  # V
    num_layers: int = Field(gt=0)  # L
    width: int = Field(gt=0)  # D
    attention: AttentionConfig
    ffn: FeedForwardConfig  # of the dense layers
    moe: MoEConfig | None = None
    tied_embedding: bool = True
    norm_epsilon: float = Field(default=1e-6, gt=0)
    lm_z_coef: float = Field(default=0.0, ge=0)  # on logsumexp(logits)^2 of the output softmax

    def is_moe(self, layer: int) -> bool:
        """Whether layer number `layer` (from 0) holds experts."""
        return self.moe is not None and layer % self.moe.every == self.moe.offset

    @property
    def num_moe_layers(self) -> int:
        return sum(self.is_moe(layer) for layer in range(self.num_layers))
