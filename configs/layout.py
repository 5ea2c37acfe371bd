"""Which layouts can carry a model: rules on degrees, faults on a number of ranks, and the nearest that works."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from configs.run import RunConfig


# ---- rules that hold on any number of ranks -------------------------------------------------------------------------
def experts_divide(c: RunConfig) -> str | None:
    num_experts = c.model.moe.num_experts if c.model.moe else 1
    if num_experts % c.parallel.expert:
        return f"parallel.expert={c.parallel.expert} does not divide model.moe.num_experts={num_experts} (1 when dense)"
    return None


def tensor_divides_heads(c: RunConfig) -> str | None:
    heads, kv_heads, tensor = c.model.attention.num_heads, c.model.attention.kv_heads, c.parallel.tensor
    if heads % tensor or kv_heads % tensor:
        return f"parallel.tensor={tensor} does not divide num_heads={heads} and num_kv_heads={kv_heads}"
    return None


def tensor_divides_widths(c: RunConfig) -> str | None:
    tensor, m = c.parallel.tensor, c.model
    widths = {"model.ffn.width": m.ffn.width}
    if m.moe and c.parallel.expert_tensor:
        widths["model.moe.expert.width"] = m.moe.expert.width
    broken = [f"{name}={width}" for name, width in widths.items() if width % tensor]
    return f"parallel.tensor={tensor} does not divide {' and '.join(broken)}" if broken else None


def tensor_divides_vocabulary(c: RunConfig) -> str | None:
    vocab, tensor = c.model.vocab_size, c.parallel.tensor
    if vocab % tensor:
        padded = -(-vocab // tensor) * tensor
        return f"parallel.tensor={tensor} does not divide model.vocab_size={vocab} (padding it to {padded} would do)"
    return None


def tensor_divides_sequence(c: RunConfig) -> str | None:
    tensor, length = c.parallel.tensor, c.train.sequence_length
    if _tensor_splits_sequence(c) and length % tensor:
        return f"parallel.tensor={tensor} does not divide train.sequence_length={length}, which it splits"
    return None


def _tensor_splits_sequence(c: RunConfig) -> bool:
    return c.parallel.sequence or (c.model.moe is not None and not c.parallel.expert_tensor)


def context_divides_heads(c: RunConfig) -> str | None:
    p, heads, kv_heads = c.parallel, c.model.attention.num_heads, c.model.attention.kv_heads
    # Fewer groups of keys and values than ranks travel as copies, as many to a rank.
    groups = kv_heads // p.tensor
    if p.context > 1 and (heads % (p.context * p.tensor) or (groups % p.context and p.context % max(1, groups))):
        return (
            f"parallel.context={p.context} x parallel.tensor={p.tensor} does not divide num_heads={heads} and "
            f"num_kv_heads={kv_heads}"
        )
    return None


def context_divides_sequence(c: RunConfig) -> str | None:
    p, length = c.parallel, c.train.sequence_length
    tensor = p.tensor if _tensor_splits_sequence(c) else 1
    if p.context > 1 and length % (p.context * tensor):
        times = f" x parallel.tensor={tensor}" if tensor > 1 else ""
        return f"parallel.context={p.context}{times} does not divide train.sequence_length={length}"
    return None


def stages_have_layers(c: RunConfig) -> str | None:
    p = c.parallel
    if p.num_stages > c.model.num_layers:
        stages = f" ({p.num_stages} stages)" if p.num_stages != p.pipeline else ""
        return f"parallel.pipeline={p.pipeline}{stages} exceeds model.num_layers={c.model.num_layers}"
    return None


def zero_0_is_float32(c: RunConfig) -> str | None:
    if c.parallel.zero_stage == 0 and c.train.precision != "float32":
        return (
            f"parallel.zero_stage=0 with train.precision={c.train.precision}: float32 gradients and masters in a bf16 "
            "run need zero_stage=1"
        )
    return None


LAYOUT_RULES: tuple[Callable[[RunConfig], str | None], ...] = (
    experts_divide,
    tensor_divides_heads,
    tensor_divides_widths,
    tensor_divides_vocabulary,
    tensor_divides_sequence,
    context_divides_heads,
    context_divides_sequence,
    stages_have_layers,
    zero_0_is_float32,
)


def with_nearest(c: RunConfig, faults: list[str]) -> list[str]:
    """The faults of `LAYOUT_RULES`, followed by the nearest degrees that break none."""
    m = c.model
    tensors = _divisors(math.gcd(m.attention.num_heads, m.attention.kv_heads))
    experts = _divisors(m.moe.num_experts if m.moe else 1)
    candidates = [
        changed
        for tensor in tensors
        for context in _contexts(c, m.attention.num_heads)
        for expert in experts
        for pipeline in {min(c.parallel.pipeline, m.num_layers // k) for k in (1, 2)} - {0}
        if _keeps_rules(changed := _with(c, tensor=tensor, context=context, expert=expert, pipeline=pipeline))
    ]
    if not candidates:
        return faults
    best = min(candidates, key=lambda other: _distance(c, other))
    changes = _changes(c, best)
    return [*faults, f"nearest that works: {changes}"] if changes else faults


# ---- faults on so many ranks ----------------------------------------------------------------------------------------
def layout_faults(c: RunConfig, world_size: int) -> list[str]:
    """What speaks against running `c` on `world_size` ranks; empty when it fits."""
    p, model_ranks = c.parallel, c.parallel.model_ranks
    context = "parallel.context x " if p.context > 1 else ""
    if world_size % model_ranks:
        return [f"{world_size} rank(s) are no multiple of {context}parallel.tensor x parallel.pipeline = {model_ranks}"]
    data, faults = world_size // model_ranks, []
    if p.data != "auto" and p.data != data:
        return [f"parallel asks for {p.data * model_ranks} rank(s) (data={p.data}), {world_size} were launched"]
    lanes, axes = data * p.context, "data x context" if p.context > 1 else "data"
    shared, axes = (lanes, axes) if p.expert_tensor else (lanes * p.tensor, f"{axes} x tensor")
    if shared % p.expert:
        faults.append(f"parallel.expert={p.expert} does not divide the {shared} rank(s) of a stage ({axes})")
    per_pass = data * c.train.micro_batch_sequences
    if c.train.batch_sequences % per_pass:
        faults.append(
            f"a batch of {c.train.batch_sequences} sequences is no multiple of data ranks x "
            f"train.micro_batch_sequences = {data} x {c.train.micro_batch_sequences}"
        )
    if c.train.eval_sequences % per_pass and c.data.heldout:
        faults.append(f"train.eval_sequences={c.train.eval_sequences} is no multiple of {per_pass} (as above)")
    if (least := least_micro_batches(c)) > 1:
        if c.train.batch_sequences // per_pass < least:
            faults.append(
                f"parallel.schedule=dualpipev needs {least} micro-batches a step (2 x pipeline), "
                f"a batch of {c.train.batch_sequences} sequences holds {c.train.batch_sequences // per_pass}"
            )
        if c.data.heldout and c.train.eval_sequences // per_pass < least:
            faults.append(f"train.eval_sequences={c.train.eval_sequences} are fewer than {least} x {per_pass}")
    return faults


def least_micro_batches(c: RunConfig) -> int:
    """Micro-batches below which the pipeline's schedule does not work."""
    return c.parallel.num_stages if c.parallel.num_stages > c.parallel.pipeline else 1


def nearest_layout(c: RunConfig, world_size: int) -> str | None:
    """Overrides for the layout nearest to the asked one that runs on `world_size` ranks; None where there is none."""
    experts = _divisors(c.model.moe.num_experts if c.model.moe else 1)
    candidates = []
    for tensor, context in itertools.product(_divisors(world_size), _contexts(c, world_size)):
        for pipeline in _divisors(world_size // tensor):
            data = world_size // (tensor * context * pipeline)
            fixed = "auto" if c.parallel.data == "auto" else max(1, data)
            for expert in experts:
                changed = _with(c, data=fixed, tensor=tensor, context=context, pipeline=pipeline, expert=expert)
                if _keeps_rules(changed) and not layout_faults(changed, world_size):
                    candidates.append(changed)
    if not candidates:
        return None
    return _changes(c, min(candidates, key=lambda other: _distance(c, other)))


def _contexts(c: RunConfig, number: int) -> Iterable[int]:
    """Degrees to try: where sequences fit a rank as they are, nobody wants them cut."""
    return _divisors(number) if c.parallel.context > 1 else [1]


def _keeps_rules(c: RunConfig) -> bool:
    return not any(rule(c) for rule in LAYOUT_RULES)


def _with(c: RunConfig, **degrees: int | str) -> RunConfig:
    return c.model_copy(update={"parallel": c.parallel.model_copy(update=degrees)})


def _distance(asked: RunConfig, other: RunConfig) -> float:
    """Doublings between two layouts; tensor, pipeline and context, which follow from the sizes of model and
    sequences, weigh more."""
    a, b = asked.parallel, other.parallel
    return (
        2 * abs(math.log2(a.tensor / b.tensor))
        + 2 * abs(math.log2(a.pipeline / b.pipeline))
        + 2 * abs(math.log2(a.context / b.context))
        + abs(math.log2(a.expert / b.expert))
    )


def _changes(asked: RunConfig, other: RunConfig) -> str:
    a, b = asked.parallel.model_dump(), other.parallel.model_dump()
    return " ".join(f"parallel.{key}={b[key]}" for key in a if a[key] != b[key])


def _divisors(number: int) -> Iterable[int]:
    return [n for n in range(1, number + 1) if number % n == 0]
