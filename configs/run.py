"""A whole run: the sections, and the rules that bind them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import Field, model_validator
from typing_extensions import Self

from configs.base import Strict
from configs.cluster import ClusterConfig
from configs.data import DataConfig
from configs.model import ModelConfig
from configs.parallel import ParallelConfig
from configs.train import TrainConfig

PRESETS = Path(__file__).parent


class RunConfig(Strict):
    """Everything a run is. The same file on one rank and on a thousand gives the same training."""

    name: str = Field(pattern=r"^[A-Za-z0-9._-]+$")
    run_dir: str
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    train: TrainConfig
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if broken := [fault for rule in RULES if (fault := rule(self))]:
            raise ValueError("; ".join(broken))
        return self


def batch_holds_whole_sequences(c: RunConfig) -> str | None:
    if c.train.batch_tokens % c.train.sequence_length:
        return (
            f"train.batch_tokens={c.train.batch_tokens} is not a multiple of "
            f"train.sequence_length={c.train.sequence_length}"
        )
    return None


def capacity_group_divides_sequence(c: RunConfig) -> str | None:
    capacity = getattr(c.model.moe.router, "capacity", None) if c.model.moe else None
    if capacity and capacity.group_tokens and c.train.sequence_length % capacity.group_tokens:
        return (
            f"model.moe.router.capacity.group_tokens={capacity.group_tokens} does not divide "
            f"train.sequence_length={c.train.sequence_length}"
        )
    return None


def experts_divide(c: RunConfig) -> str | None:
    num_experts = c.model.moe.num_experts if c.model.moe else 1
    if num_experts % c.parallel.expert:
        return f"parallel.expert={c.parallel.expert} does not divide model.moe.num_experts={num_experts} (1 when dense)"
    return None


def schedule_fits_steps(c: RunConfig) -> str | None:
    schedule, steps = c.train.schedule, c.train.steps
    used = schedule.warmup_steps + (schedule.decay_steps if schedule.kind == "wsd" else 0)
    if schedule.kind != "inverse_sqrt" and used > steps:
        return (
            f"train.schedule needs {used} steps to warm up and decay, train.steps={steps}: shorten it or train longer"
        )
    return None


def source_names_differ(c: RunConfig) -> str | None:
    names = [source.name for source in c.data.sources]
    twice = sorted({name for name in names if names.count(name) > 1})
    return f"data.sources: the name {twice[0]!r} is used twice; the cursor needs distinct names" if twice else None


def tensor_divides_heads(c: RunConfig) -> str | None:
    heads, kv_heads, tensor = c.model.attention.num_heads, c.model.attention.kv_heads, c.parallel.tensor
    if heads % tensor or kv_heads % tensor:
        return f"parallel.tensor={tensor} does not divide num_heads={heads} and num_kv_heads={kv_heads}"
    return None


def stages_have_layers(c: RunConfig) -> str | None:
    if c.parallel.pipeline > c.model.num_layers:
        return f"parallel.pipeline={c.parallel.pipeline} exceeds model.num_layers={c.model.num_layers}"
    return None


RULES: tuple[Callable[[RunConfig], str | None], ...] = (
    batch_holds_whole_sequences,
    capacity_group_divides_sequence,
    experts_divide,
    schedule_fits_steps,
    source_names_differ,
    tensor_divides_heads,
    stages_have_layers,
)


def layout_faults(c: RunConfig, world_size: int) -> list[str]:
    """What speaks against running `c` on `world_size` ranks; empty when it fits."""
    p, model_ranks = c.parallel, c.parallel.tensor * c.parallel.pipeline
    if world_size % model_ranks:
        return [f"{world_size} rank(s) are no multiple of parallel.tensor x parallel.pipeline = {model_ranks}"]
    data, faults = world_size // model_ranks, []
    if p.data != "auto" and p.data != data:
        return [f"parallel asks for {p.data * model_ranks} rank(s) (data={p.data}), {world_size} were launched"]
    if (data * p.tensor) % p.expert:
        faults.append(f"parallel.expert={p.expert} does not divide the {data * p.tensor} rank(s) of a stage")
    per_pass = data * c.train.micro_batch_sequences
    if c.train.batch_sequences % per_pass:
        faults.append(
            f"a batch of {c.train.batch_sequences} sequences is no multiple of data ranks x "
            f"train.micro_batch_sequences = {data} x {c.train.micro_batch_sequences}"
        )
    if c.train.eval_sequences % per_pass and c.data.heldout:
        faults.append(f"train.eval_sequences={c.train.eval_sequences} is no multiple of {per_pass} (as above)")
    return faults
