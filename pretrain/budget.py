"""What a run costs: parameters, FLOPs, bytes. Formulas only, no devices; `glam plan`, logs and tests all ask here.

D width, H heads, N head width, F ffn width, E experts, k choices a token, V vocabulary, L layers, S sequence length.
Parameter formulas: GLaM, arXiv:2112.06905, table 4, recounted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from configs.model import FeedForwardConfig, ModelConfig
from configs.run import RunConfig
from parallel.stages import Stages, cut_by_cost


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


def checkpoint_bytes(m: ModelConfig) -> int:
    """Bytes of a checkpoint: float32 weights and two moments."""
    return 12 * parameters(m).total


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
    and 12*H*N for each key it attends to, of which a causal row has (S + 1) / 2 on average, a block-sparse one fewer.
    """
    return round(sum(block_flops(m, sequence_length)) + 6 * m.vocab_size * m.width)


def block_flops(m: ModelConfig, sequence_length: int) -> list[float]:
    """`flops_per_token` of each block; the output product is the rest."""
    p, dense_layers = parameters(m), m.num_layers - m.num_moe_layers
    attention = 6 * p.attention / m.num_layers
    a_key = 12 * m.attention.num_heads * m.attention.head_width
    full, sparse_keys = (sequence_length + 1) / 2, keys_a_query(m, sequence_length)
    spec = m.attention.sparse
    keys = [sparse_keys if spec and spec.is_sparse(layer) else full for layer in range(m.num_layers)]
    dense = 6 * p.dense_ffn / max(1, dense_layers)
    sparse = 6 * (p.active_experts + p.router) / max(1, m.num_moe_layers)
    return [attention + a_key * keys[layer] + (sparse if m.is_moe(layer) else dense) for layer in range(m.num_layers)]


def keys_a_query(m: ModelConfig, sequence_length: int) -> float:
    """Keys a query of a block-sparse layer attends to, on average over the sequence."""
    if m.attention.sparse is None:
        return (sequence_length + 1) / 2
    from model.patterns import block_layout  # torch: a second that a plan of full attention need not wait for

    layout = block_layout(m.attention.sparse, 0, range(1), sequence_length)
    b, rows = layout.block_size, layout.num_rows
    blocks_a_row = layout.density() * (rows + 1) / 2
    return blocks_a_row * b - (b - 1) / 2  # of its own block a query sees half


def stages(c: RunConfig) -> Stages:
    """Where the pipeline's stages are cut: as even in FLOPs as contiguous cuts allow."""
    m, p = c.model, c.parallel
    blocks, end = block_flops(m, c.train.sequence_length), 6 * m.vocab_size * m.width
    return cut_by_cost(blocks, end, p.pipeline, v_shaped=p.schedule == "dualpipev")


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
    """Memory of one rank, of the stage that needs most, under the configured layout on `world_size` ranks."""
    return max((stage_bytes(c, world_size, stage) for stage in range(c.parallel.pipeline)), key=lambda b: b.total)


def stage_bytes(c: RunConfig, world_size: int, stage: int) -> RankBytes:
    """Memory of one rank of a stage."""
    m, p, t = c.model, c.parallel, c.train
    data = p.data_degree(world_size)
    lanes = data * p.context
    cut = stages(c)
    dense, experts, copied = stage_parameters(m, cut, stage)
    dense, experts, copied = dense // p.tensor, experts // p.ranks_for_all_experts, copied // p.tensor
    replicas = max(1, lanes * p.tensor // p.ranks_for_all_experts)
    shared = p.zero_stage == 1
    weight_bytes = 2 if t.precision == "bf16" else 4
    # Weights in float32 without ZeRO are their own masters.
    state_bytes = 12 if shared else 8
    micro_tokens = t.micro_batch_sequences * t.sequence_length // p.context
    # Passes of this place's layers held at once: 1F1B, as many as there are stages from here to the last; DualPipeV,
    # 2P + 1 passes of one of its two pieces at most.
    in_flight = (cut.num_pieces + 1) / 2 if cut.v_shaped else p.pipeline - stage
    in_flight = min(in_flight, t.num_micro_batches(data) or 1)
    layers = len(cut.blocks(stage))
    # What enters attention and a dense feed-forward layer is whole on each tensor rank, and kept so.
    a_layer = activation_values_per_token(m, t.sequence_length) / p.tensor + 2 * m.width * (1 - 1 / p.tensor)
    kept = m.width / (p.tensor if p.sequence else 1)
    values = layers * in_flight * kept + a_layer if t.recompute else layers * in_flight * (a_layer + kept)
    at_the_loss = 4 * m.vocab_size * m.width // p.tensor
    logits = min(micro_tokens * m.vocab_size * 4 // p.tensor, 512 * 2**20) * 2 + at_the_loss
    return RankBytes(
        weights=weight_bytes * (dense + experts + copied),
        gradients=4 * (dense + experts + copied),
        optimizer=state_bytes * (dense // (lanes if shared else 1) + experts // (replicas if shared else 1)),
        activations=round(values * micro_tokens * weight_bytes),
        # Both the float32 logits of a chunk and their gradient in the weights' type, and the gradient of the table.
        logits=logits if cut.ends(stage) else 0,
    )


def stage_parameters(m: ModelConfig, cut: Stages, stage: int) -> tuple[int, int, int]:
    """(dense, expert, copied) parameters of a pipeline stage; copied is a tied embedding whose owner is another."""
    p, blocks = parameters(m), cut.blocks(stage)
    moe_layers = sum(m.is_moe(layer) for layer in blocks)
    dense_layers, table = len(blocks) - moe_layers, m.vocab_size * m.width
    every_layer = p.attention + p.norms - m.width + p.position
    dense = every_layer // m.num_layers * len(blocks)
    dense += p.dense_ffn // max(1, m.num_layers - m.num_moe_layers) * dense_layers
    dense += p.router // max(1, m.num_moe_layers) * moe_layers
    ends, embeds = cut.ends(stage), cut.embeds(stage)
    dense += (m.width if ends else 0) + (table if embeds else 0)
    dense += table if ends and not m.tied_embedding else 0
    copied = table if ends and m.tied_embedding and not embeds else 0
    return dense, p.experts // max(1, m.num_moe_layers) * moe_layers, copied


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
