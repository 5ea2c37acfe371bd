"""A whole run: the sections, and the rules that bind them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pydantic import Field, model_validator
from typing_extensions import Self

from configs.base import Strict
from configs.cluster import ClusterConfig
from configs.data import DataConfig
from configs.layout import LAYOUT_RULES, with_nearest
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
        broken = [fault for rule in RULES if (fault := rule(self))]
        if misfits := [fault for rule in LAYOUT_RULES if (fault := rule(self))]:
            broken += with_nearest(self, misfits)
        if broken:
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


def sparse_blocks_fit_sequence(c: RunConfig) -> str | None:
    """What a layout asks for must exist at the training length, or it is another layout than it says."""
    sparse = c.model.attention.sparse
    if sparse is None or sparse.layout.kind == "full":
        return None
    length, layout = c.train.sequence_length, sparse.layout
    num_blocks = length // sparse.block_size
    there = f"train.sequence_length={length} has {num_blocks} whole blocks of {sparse.block_size}"
    if not any(sparse.is_sparse(layer) for layer in range(c.model.num_layers)):
        return (
            f"model.attention.sparse.pattern={sparse.pattern} marks none of model.num_layers={c.model.num_layers} as S"
        )
    if num_blocks < 2:
        return f"model.attention.sparse.block_size={sparse.block_size} is too large: {there}, two at least are wanted"
    if layout.kind == "bigbird" and (asked := layout.sinks + layout.window + layout.random) > num_blocks:
        return (
            f"model.attention.sparse.layout: sinks + window + random = {asked} blocks, {there}: more than its past; "
            "take fewer or smaller blocks, or longer sequences"
        )
    beyond = num_blocks - layout.window  # blocks of the past that the last row's window does not hold
    if layout.kind == "etc" and layout.sinks > beyond:
        return f"model.attention.sparse.layout: sinks + window = {layout.sinks + layout.window} blocks, {there}"
    if layout.kind == "etc" and layout.segment_tokens > beyond * sparse.block_size:
        return (
            f"model.attention.sparse.layout.segment_tokens={layout.segment_tokens}: no summary is older than a "
            f"window of {layout.window} blocks; {there}"
        )
    if layout.kind == "strided" and layout.stride > beyond:
        return (
            f"model.attention.sparse.layout.stride={layout.stride} blocks: none is older than a window of "
            f"{layout.window}; {there}"
        )
    return None


def document_end_is_a_token(c: RunConfig) -> str | None:
    end = c.model.attention.document_end
    if end is not None and end >= c.model.vocab_size:
        return f"model.attention.document_end={end} is no token of model.vocab_size={c.model.vocab_size}"
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


RULES: tuple[Callable[[RunConfig], str | None], ...] = (
    batch_holds_whole_sequences,
    capacity_group_divides_sequence,
    sparse_blocks_fit_sequence,
    document_end_is_a_token,
    schedule_fits_steps,
    source_names_differ,
)
