"""What a run costs: parameters, FLOPs, bytes. Formulas only, no devices; `glam plan`, logs and tests all ask here.

D width, H heads, N head width, F ffn width, E experts, k choices a token, V vocabulary, L layers, S sequence length.
Parameter formulas: GLaM, arXiv:2112.06905, table 4, recounted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from configs.model import FeedForwardConfig, ModelConfig
from configs.run import RunConfig


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters by part; `active` are those one token passes through."""

    attention: int
    norms: int
    position: int
    dense_ffn: int
    experts: int
    router: int
    embedding: int
    active_experts: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values()) - self.active_experts

    @property
    def active(self) -> int:
        return self.total - self.experts + self.active_experts


def experts_a_token(m: ModelConfig) -> float:
    """Experts each token visits, on average where experts choose."""
    if m.moe is None:
        return 0
    return m.moe.router.capacity_factor if m.moe.router.kind == "expert_choice" else m.moe.router.k


def ffn_parameters(width: int, ffn: FeedForwardConfig) -> int:
    return (3 if ffn.gated else 2) * width * ffn.width


def parameters(m: ModelConfig) -> Parameters:
    """Parameter counts of the whole model."""
    a, D, L, L_moe = m.attention, m.width, m.num_layers, m.num_moe_layers
    qk_norms = 2 * a.head_width if a.qk_norm else 0
    expert = ffn_parameters(D, m.moe.expert) if m.moe else 0
    num_experts = m.moe.num_experts if m.moe else 0
    gates = 2 if m.moe and m.moe.router.kind == "noisy_topk" else 1
    return Parameters(
        attention=L * 2 * D * a.head_width * (a.num_heads + a.kv_heads),
        norms=L * (2 * D + qk_norms) + D,
        position=L * a.num_heads * a.position.num_buckets if a.position.kind == "relative_bias" else 0,
        dense_ffn=(L - L_moe) * ffn_parameters(D, m.ffn),
        experts=L_moe * num_experts * expert,
        router=L_moe * num_experts * D * gates,
        embedding=m.vocab_size * D * (1 if m.tied_embedding else 2),
        active_experts=round(L_moe * min(experts_a_token(m), num_experts) * expert),
    )


def flops_per_token(m: ModelConfig, sequence_length: int) -> int:
    """Floating-point operations of forward and backward for one token; recomputation is not counted.

    6 for each weight of a matrix product a token meets (the embedding look-up is none, the output product is one),
    and 12*H*N for each key it attends to, of which a causal row has (S + 1) / 2 on average.
    """
    p = parameters(m)
    products = p.attention + p.dense_ffn + p.active_experts + p.router + m.vocab_size * m.width
    keys = (sequence_length + 1) / 2
    return round(6 * products + m.num_layers * 12 * m.attention.num_heads * m.attention.head_width * keys)


@dataclass(frozen=True)
class RankBytes:
    """Bytes one rank of the heaviest stage holds while training. Activations are an estimate, the rest exact but for
    a few per cent of buckets and buffers."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def bytes_per_rank(c: RunConfig, world_size: int) -> RankBytes:
    """Memory of one rank under the configured layout on `world_size` ranks (ZeRO-1)."""
    m, p, t = c.model, c.parallel, c.train
    data = p.data_degree(world_size)
    dense, experts = stage_parameters(m, p.pipeline)
    dense, experts = dense // p.tensor, experts // p.expert
    replicas = max(1, data * p.tensor // p.expert)
    weight_bytes = 2 if t.precision == "bf16" else 4
    micro_tokens = t.micro_batch_sequences * t.sequence_length
    layers, in_flight = -(-m.num_layers // p.pipeline), min(p.pipeline, t.num_micro_batches(data) or 1)
    a_layer = activation_values_per_token(m, t.sequence_length) / p.tensor
    if t.recompute:
        values = layers * in_flight * m.width + a_layer
    else:
        values = layers * in_flight * (a_layer + m.width)
    return RankBytes(
        weights=weight_bytes * (dense + experts),
        gradients=4 * (dense + experts),
        optimizer=12 * (dense // data + experts // replicas),
        activations=round(values * micro_tokens * weight_bytes),
        # Both the float32 logits of a chunk and their gradient in the weights' type, and the gradient of the table.
        logits=min(micro_tokens * m.vocab_size * 4, 512 * 2**20) * 2 + 4 * m.vocab_size * m.width // p.tensor,
    )


def stage_parameters(m: ModelConfig, num_stages: int) -> tuple[int, int]:
    """(dense, expert) parameters of the heaviest pipeline stage, layers cut evenly."""
    p = parameters(m)
    per_stage = -(-m.num_layers // num_stages)
    moe_layers = max(
        sum(m.is_moe(n) for n in range(s, min(s + per_stage, m.num_layers))) for s in range(0, m.num_layers, per_stage)
    )
    share = per_stage / m.num_layers
    dense_layers = max(0, per_stage - moe_layers)
    dense_ffn = p.dense_ffn // max(1, m.num_layers - m.num_moe_layers) * dense_layers
    a_table = m.vocab_size * m.width
    tables = p.embedding if num_stages == 1 else a_table
    experts = p.experts // max(1, m.num_moe_layers) * moe_layers
    router = p.router // max(1, m.num_moe_layers) * moe_layers
    return round((p.attention + p.norms + p.position) * share) + dense_ffn + router + tables, experts


def activation_values_per_token(m: ModelConfig, sequence_length: int) -> float:
    """Values one layer keeps for its backward pass, for each token, averaged over layers."""
    a, D = m.attention, m.width
    attention = 2 * D + 2 * a.head_width * (a.num_heads + a.kv_heads)
    if a.position.kind == "relative_bias":  # the bias needs a gradient, so scores are kept
        attention += 2 * a.num_heads * sequence_length
    dense = D + (3 if m.ffn.gated else 2) * m.ffn.width
    if m.moe is None:
        return attention + dense
    sparse = experts_a_token(m) * (2 * D + (3 if m.moe.expert.gated else 2) * m.moe.expert.width)
    return attention + dense + (sparse - dense) * m.num_moe_layers / m.num_layers


def energy_mwh(chips: int, hours: float, watts_a_chip: float, pue: float) -> float:
    """Energy of a run in MWh (arXiv:2112.06905, sec. 6.4): chips x hours x watts x power usage effectiveness."""
    return chips * hours * watts_a_chip * pue / 1e6
