"""Mixture-of-experts layers, ours and other people's, behind one interface and with the same weights.

All: top-2 of a softmax, gate weights renormalised over the two, tanh-GeLU experts without biases.
T tokens, D width, F ffn width, E experts.
"""

from __future__ import annotations

import logging
import socket
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from configs.model import FeedForwardConfig, MoEConfig, TopKRouter
from model.feedforward import FeedForward
from model.moe import MoE

K = 2
SEQUENCES = 4  # the T tokens are so many sequences for layers whose balance loss is per sequence


@dataclass(frozen=True)
class Weights:
    """One draw for all layers of a kind, on the device and in the type measured."""

    router_ED: Tensor  # float32
    gate_EFD: Tensor | None
    up_EFD: Tensor
    down_EDF: Tensor

    @property
    def num_experts(self) -> int:
        return self.router_ED.shape[0]

    @property
    def width(self) -> int:
        return self.router_ED.shape[1]

    @property
    def ffn_width(self) -> int:
        return self.up_EFD.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.up_EFD.dtype

    @property
    def device(self) -> torch.device:
        return self.up_EFD.device


def draw_weights(
    num_experts: int, width: int, ffn_width: int, gated: bool, dtype: torch.dtype, device: torch.device
) -> Weights:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

    router_ED = draw(num_experts, width)
    up, down = draw(num_experts, ffn_width, width), draw(num_experts, width, ffn_width)
    gate = draw(num_experts, ffn_width, width).to(device, dtype) if gated else None
    return Weights(router_ED.to(device), gate, up.to(device, dtype), down.to(device, dtype))


class Layer(nn.Module):
    """x[T, D] -> (y[T, D], the auxiliary loss this layer trains with, or None where it has none or keeps it inside)."""

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError


@dataclass(frozen=True)
class Candidate:
    """A layer to be measured. `dropless`: its output must equal ours up to rounding."""

    name: str
    gated: bool
    dropless: bool
    build: Callable[[Weights], Layer]
    quick: bool = True  # False: too slow for --quick


class Dense(Layer):
    """A dense feed-forward layer that does as many multiplications a token: the limit."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        config = FeedForwardConfig(width=K * weights.ffn_width, activation="gelu", gated=weights.gate_EFD is not None)
        self.ffn = FeedForward(weights.width, config).to(weights.device, weights.dtype)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, None]:
        return self.ffn(x_TD), None


class Ours(Layer):
    """`model.moe.MoE` as a block of the model calls it."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        expert = FeedForwardConfig(width=weights.ffn_width, activation="gelu", gated=weights.gate_EFD is not None)
        config = MoEConfig(num_experts=weights.num_experts, expert=expert, router=TopKRouter(k=K))
        with torch.device(weights.device):
            self.moe = MoE(weights.width, config)
        with torch.no_grad():
            self.moe.router.weight.copy_(weights.router_ED)
        for name, value in (("gate", weights.gate_EFD), ("up", weights.up_EFD), ("down", weights.down_EDF)):
            if value is not None:
                setattr(self.moe.experts, name, nn.Parameter(value.clone()))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        y_BSD, aux_loss, _ = self.moe(x_TD.unflatten(0, (SEQUENCES, -1)))
        return y_BSD.flatten(0, 1), aux_loss


class DeepSpeedMoE(Layer):
    """`deepspeed.moe.layer.MoE`, stock: capacity buffers, one expert after the other."""

    def __init__(self, weights: Weights, drop_tokens: bool) -> None:
        super().__init__()
        _start_process_group()
        from deepspeed.moe.layer import MoE as Peer

        expert = FeedForward(weights.width, FeedForwardConfig(width=weights.ffn_width, activation="gelu", gated=False))
        self.moe = Peer(
            weights.width,
            expert,
            num_experts=weights.num_experts,
            ep_size=1,
            k=K,
            capacity_factor=1.0,
            drop_tokens=drop_tokens,
            top2_2nd_expert_sampling=False,  # its noise would choose other experts
        ).to(weights.device, weights.dtype)
        self.moe.set_deepspeed_parallelism()
        gate = self.moe.deepspeed_moe.gate.wg.float()  # as DeepSpeed's engine keeps it
        with torch.no_grad():
            gate.weight.copy_(weights.router_ED)
            for e, own in enumerate(self.moe.deepspeed_moe.experts.deepspeed_experts):
                own.in_proj.weight.copy_(weights.up_EFD[e])
                own.out_proj.weight.copy_(weights.down_EDF[e])

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        y_TD, aux_loss, _ = self.moe(x_TD)
        return y_TD, aux_loss


class DeepSpeedAutoEP(Layer):
    """The core of DeepSpeed's AutoEP (after torchtitan): its router and its grouped experts, tokens carried between
    them as its layer does on one rank: sort, gather, weigh, add back."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        from deepspeed.moe.ep_experts import GroupedExperts
        from deepspeed.moe.ep_router import TokenChoiceTopKRouter

        self.router = TokenChoiceTopKRouter(
            weights.width,
            weights.num_experts,
            None,
            None,
            K,
            "softmax",
            route_norm=True,
            route_scale=1.0,
            gate_bias=False,
        ).to(weights.device, weights.dtype)
        self.experts = GroupedExperts(
            weights.width, weights.ffn_width, weights.num_experts, use_grouped_mm=True, activation="geglu_tanh"
        ).to(weights.device, weights.dtype)
        assert weights.gate_EFD is not None
        with torch.no_grad():
            self.router.gate.weight.copy_(weights.router_ED)
            self.experts.w1.copy_(weights.gate_EFD)
            self.experts.w3.copy_(weights.up_EFD)
            self.experts.w2.copy_(weights.down_EDF)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, None]:
        weight_TK, expert_TK, counts_E = self.router(x_TD)
        choice_N = torch.argsort(expert_TK.flatten(), stable=True)
        token_N = choice_N // K
        rows_ND = self.experts(x_TD[token_N], counts_E)
        weighted_ND = (rows_ND.float() * weight_TK.flatten()[choice_N, None]).to(x_TD.dtype)
        return torch.zeros_like(x_TD).index_add(0, token_N, weighted_ND), None


class MegatronMoE(Layer):
    """megatron-core's `MoELayer`, without TransformerEngine: all-gather dispatcher on one rank, sequential experts."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        _start_process_group()
        _let_megatron_run_here()
        from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from megatron.core.transformer.spec_utils import build_module
        from megatron.core.transformer.transformer_config import TransformerConfig

        if weights.device.type == "cuda":
            model_parallel_cuda_manual_seed(0)
        config = TransformerConfig(
            num_layers=1,
            hidden_size=weights.width,
            num_attention_heads=1,
            ffn_hidden_size=weights.ffn_width,
            num_moe_experts=weights.num_experts,
            moe_router_topk=K,
            moe_token_dispatcher_type="allgather",
            moe_router_load_balancing_type="aux_loss",
            moe_aux_loss_coeff=0.01,
            moe_router_dtype="fp32",
            moe_grouped_gemm=False,
            add_bias_linear=False,
            use_cpu_initialization=True,
            params_dtype=weights.dtype,
            gated_linear_unit=False,
            activation_func=_tanh_gelu,
            bias_activation_fusion=False,
            gradient_accumulation_fusion=False,
        )
        spec = get_moe_module_spec(use_te=False, num_experts=weights.num_experts, moe_grouped_gemm=False)
        self.moe = build_module(spec, config=config, layer_number=1).to(weights.device)
        with torch.no_grad():
            self.moe.router.weight.copy_(weights.router_ED)
            for e, own in enumerate(self.moe.experts.local_experts):
                own.linear_fc1.weight.copy_(weights.up_EFD[e])
                own.linear_fc2.weight.copy_(weights.down_EDF[e])

    def forward(self, x_TD: Tensor) -> tuple[Tensor, None]:
        # Its auxiliary loss enters its own backward pass.
        return self.moe(x_TD.unsqueeze(1))[0].squeeze(1), None


class Qwen3MoE(Layer):
    """transformers' Qwen3-MoE block; `implementation` is "eager" or "grouped_mm"."""

    def __init__(self, weights: Weights, implementation: str) -> None:
        super().__init__()
        from transformers import Qwen3MoeConfig
        from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

        config = Qwen3MoeConfig(
            hidden_size=weights.width,
            moe_intermediate_size=weights.ffn_width,
            num_experts=weights.num_experts,
            num_experts_per_tok=K,
            norm_topk_prob=True,
            hidden_act="gelu_pytorch_tanh",
            experts_implementation=implementation,
        )
        self.moe = Qwen3MoeSparseMoeBlock(config).to(weights.device, weights.dtype)
        assert weights.gate_EFD is not None
        with torch.no_grad():
            self.moe.gate.weight.copy_(weights.router_ED)
            self.moe.experts.gate_up_proj.copy_(torch.cat((weights.gate_EFD, weights.up_EFD), dim=1))
            self.moe.experts.down_proj.copy_(weights.down_EDF)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, None]:
        return self.moe(x_TD[None])[0], None


def candidates() -> tuple[Candidate, ...]:
    """Dense and ours first of each kind. Ungated and gated layers are never compared with each other."""
    return (
        Candidate("dense", False, False, Dense),
        Candidate("ours", False, True, Ours),
        Candidate("DeepSpeed MoE, drops", False, False, lambda w: DeepSpeedMoE(w, drop_tokens=True)),
        Candidate("DeepSpeed MoE, keeps all", False, True, lambda w: DeepSpeedMoE(w, drop_tokens=False)),
        Candidate("Megatron-core", False, True, MegatronMoE),
        Candidate("dense, gated", True, False, Dense),
        Candidate("ours, gated", True, True, Ours),
        Candidate("DeepSpeed AutoEP, gated", True, True, DeepSpeedAutoEP),
        Candidate("Qwen3-MoE grouped_mm, gated", True, True, lambda w: Qwen3MoE(w, "grouped_mm")),
        Candidate("Qwen3-MoE eager, gated", True, True, lambda w: Qwen3MoE(w, "eager"), quick=False),
    )


def _tanh_gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _start_process_group() -> None:
    """A world of one, for peers that ask for one."""
    if torch.distributed.is_initialized():
        return
    from parallel import groups

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    groups.start(0, 1, 0, "127.0.0.1", port, timeout_s=60)


def _let_megatron_run_here() -> None:
    """Groups for megatron-core, and two shims it needs to run on a CPU or without TransformerEngine.

    Upstream (megatron-core 0.16.1): layers ask `torch.cuda.current_device()` even with use_cpu_initialization; and
    transformer/moe/moe_utils.py names `te_general_gemm` without defining it where TransformerEngine is missing.
    """
    import megatron.core.transformer.moe.moe_utils as moe_utils
    from megatron.core import parallel_state

    if not torch.cuda.is_available():
        torch.cuda.current_device = lambda: torch.device("cpu")  # type: ignore[assignment, return-value]
    _define(moe_utils, "te_general_gemm")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(1, 1)


def _define(module: types.ModuleType, name: str, value: Any = None) -> None:
    if not hasattr(module, name):
        setattr(module, name, value)
