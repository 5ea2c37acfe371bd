"""What a run reads: token shards made by `glam prep`, and how they are mixed."""

from __future__ import annotations

from pydantic import Field

from configs.base import Strict


class DataSource(Strict):
    """One folder of token shards and its share of the training tokens."""

    name: str
    path: str
    weight: float = Field(default=1.0, gt=0)  # normalised over all sources


class DataConfig(Strict):
    """Training sources are mixed by weight and repeat when used up; held-out folders are read in order, once."""

    sources: tuple[DataSource, ...] = Field(min_length=1)
    heldout: tuple[str, ...] = ()
    seed: int = Field(default=0, ge=0, lt=2**32)  # keys the order of samples
    blocklist: str | None = None  # samples never to draw: the blocklist.jsonl of a run that met bad ones
