"""Which documents a training step saw: from the run's own records and the shards, without a device.

A run's metrics hold its data cursor now and then, and at each start the data it read and the ranks it ran on. From the
nearest cursor before a step the sampler is wound on to it: the same code that fed the step, so the same answer. A
rollback counts as a start: what is on record behind it was made with its blocklist.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from configs.data import DataConfig
from configs.errors import UserError
from data_prep.format import TokenStream
from data_prep.tokenizer import Tokenizer
from parallel.topology import Topology
from pretrain.blocklist import from_json
from pretrain.data import Cursor, Sampler
from pretrain.metrics_file import read_metrics

_FIRST_TOKENS = 64  # of a document, decoded for its first line


@dataclass(frozen=True)
class Seen:
    """A document, or a part of one, in one sequence of a batch.

    Attributes:
        sequence: its number in the global batch.
        data_rank: the data-parallel rank that read it.
        epoch: of its source, from 0.
        origin: source file, and the line or row in it counted from 1.
        first_token: of the part, counted from the document's begin.
        tokens: of the part that are in the sequence.
        first_line: of the document.
    """

    sequence: int
    data_rank: int
    source: str
    epoch: int
    shard: str
    document: int
    origin: str
    first_token: int
    tokens: int
    first_line: str


def batch_documents(run_dir: Path, step: int, rank: int | None = None) -> list[Seen]:
    """The documents of the batch that made step `step` (counted from 1, as the log does), in order.

    Args:
        rank: only what this rank read; context ranks read the same sequences, and each holds its part of them.

    Raises:
        UserError: no such run, step or rank, or its data is gone.
    """
    start, cursor, begun = _nearest_cursor(run_dir, step)
    layout = start["layout"]
    data = {**start["data"], "blocklist": None}  # on record itself; the file may have changed since
    sampler = Sampler(DataConfig.check(data, str(run_dir)), start["sequence_length"], cursor)
    for name, source in sampler.sources.items():
        if source.stream.identity != start["datasets"].get(name):
            raise UserError(
                f"data source {name!r}: {source.stream.folder} has been made again since step {step}",
                f"the data set the run read ({start['datasets'].get(name)})",
                "put back what was there, or prepare it again with the same configuration",
            )
    sampler.block(from_json(start.get("blocklist", [])))
    sequences = start["batch_tokens"] // start["sequence_length"]
    for _ in range(begun, step - 1):
        sampler.next_batch(sequences)
    chosen = sampler.next_batch(sequences)
    context = layout.get("context", 1)  # runs of before there was any do not name it
    ranks = Topology(0, layout["data"], layout["tensor"], layout["pipeline"], context=context)
    wanted = None
    if rank is not None:
        if not 0 <= rank < ranks.world_size:
            told = f"0 <= rank < {ranks.world_size}: the ranks step {step} ran on"
            raise UserError(f"--rank {rank}", told, "mend --rank")
        wanted = ranks.at(rank).data_rank
    per_rank = sequences // layout["data"]
    return [
        seen
        for number, (name, sample) in enumerate(chosen)
        if wanted is None or number // per_rank == wanted
        for seen in documents_of(sampler, name, sample, number, number // per_rank)
    ]


def as_rows(seen: list[Seen]) -> list[dict[str, Any]]:
    """For JSON."""
    return [asdict(one) for one in seen]


def _nearest_cursor(run_dir: Path, step: int) -> tuple[dict[str, Any], Cursor, int]:
    """The start that made the step, and the last cursor before it with the number of steps behind it."""
    records = read_metrics(run_dir)
    if not records:
        raise UserError(f"{run_dir} has no metrics.jsonl", "the folder of a run that has started", "check the path")
    starts = [r for r in records if r.get("event") in ("started", "rolled_back") and "datasets" in r]
    reached = max(record["step"] for record in records)
    if not starts or not 1 <= step <= reached:
        found = f"--step {step} of {run_dir}, which has recorded steps 1 to {reached}"
        raise UserError(found, "a step that was made", "mend --step; steps are counted from 1, as in the log")
    before = [r for r in starts if r["step"] < step]
    if not before:
        found = f"--step {step}: made before runs recorded what they read"
        raise UserError(found, f"a step behind {starts[0]['step']}", "mend --step")
    start = before[-1]
    since = records[records.index(start) :]
    cursors = [r for r in since if "cursor" in r and start["step"] <= r["step"] < step]
    return start, Cursor(**cursors[-1]["cursor"]), cursors[-1]["step"]


def documents_of(sampler: Sampler, name: str, sample: int, number: int = 0, data_rank: int = 0) -> Iterator[Seen]:
    """The documents in sample `sample` of source `name`.

    Args:
        number, data_rank: where in a batch it is, to be told with them.
    """
    source = sampler.sources[name]
    epoch = sample // source.num_samples
    first = source.window_of(sample) * source.length
    for place in source.stream.locate(first, source.length + 1):
        origin = source.stream.origin(place.shard, place.document)
        yield Seen(
            number,
            data_rank,
            name,
            epoch,
            source.stream.shard_name(place.shard),
            place.document,
            _shown(source.stream, origin),
            place.offset,
            place.tokens,
            _first_line(source.stream, place.begin),
        )


def _shown(stream: TokenStream, origin: tuple[str, int] | None) -> str:
    if origin is None or stream.manifest is None:
        return "unknown (made by another tool)"
    path, record = origin
    return path if stream.manifest.records == "file" else f"{path}:{record + 1}"


def _first_line(stream: TokenStream, begin: int) -> str:
    if stream.manifest is None:
        return ""
    ids = stream.read(begin, min(_FIRST_TOKENS, stream.num_tokens - begin))
    ends = np.flatnonzero(ids == stream.eos_id)
    text = _tokenizer(stream.folder / stream.manifest.tokenizer).decode(ids[: int(ends[0])] if ends.size else ids)
    return next((line.strip() for line in text.split("\n") if line.strip()), "")


@lru_cache(maxsize=4)  # corpora of one run
def _tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer(folder)
