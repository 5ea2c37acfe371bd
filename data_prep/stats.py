"""`glam prep stats`: a corpus in tables and in one picture."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.table import Table

from data_prep.format import TokenStream
from data_prep.summary import PrepSummary, SideSummary, SourceSummary, make_table

_LENGTH_EDGES = 2.0 ** np.arange(0, 32)  # tokens of a document, by octaves, up to the longest the format holds


@dataclass(frozen=True)
class DatasetStats:
    """One dataset.

    Attributes:
        lengths: documents by length, in octaves of tokens: [0] holds 1, [1] holds 2..3, [2] holds 4..7, …
        median, mean, longest: tokens of a document.
        weight: its share of the training mixture, 0 for held-out ones.
    """

    source: str
    side: str
    weight: float
    documents: int
    tokens: int
    bytes_per_token: float
    median: float
    mean: float
    longest: int
    lengths: list[int]


@dataclass(frozen=True)
class CorpusStats:
    """A corpus: its datasets, and what was left out of each source, by rule."""

    name: str
    datasets: list[DatasetStats]
    left_out: dict[str, dict[str, int]]
    documents_read: dict[str, int]
    classifier: dict[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def corpus_stats(folder: Path) -> CorpusStats:
    """Count what the indices and the summary say; tokens are not read.

    Raises:
        UserError: no complete corpus there.
    """
    summary = PrepSummary.load(folder)
    total = sum(source.weight for source in summary.sources)
    weights = {source.source: source.weight / total for source in summary.sources}
    return CorpusStats(
        str(folder),
        [_dataset(folder, row, weights[row.source]) for row in summary.datasets],
        {source.source: _left_out(source) for source in summary.sources},
        {s.source: int(s.stages["read"]["documents"] + s.stages["read"]["rejects"]) for s in summary.sources},
        summary.classifier,
    )


def _dataset(folder: Path, row: SideSummary, weight: float) -> DatasetStats:
    stream = TokenStream(folder / row.side / row.source)
    lengths, counts = _lengths(stream)
    return DatasetStats(
        row.source,
        row.side,
        weight if row.side == "train" else 0.0,
        row.documents,
        row.tokens,
        row.text_bytes / row.tokens,
        _median(lengths, counts),
        float(np.average(lengths, weights=counts)),
        int(lengths[-1]),
        [int(n) for n in np.histogram(lengths, _LENGTH_EDGES, weights=counts)[0]],
    )


def _lengths(stream: TokenStream) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The lengths of documents that occur, ascending, and how often each: far fewer than documents."""
    found = Counter[int]()
    for shard in range(stream.num_shards):
        lengths, counts = np.unique(np.diff(stream.documents(shard)), return_counts=True)
        found.update(dict(zip(lengths.tolist(), counts.tolist())))
    pairs = sorted(found.items())
    return np.array([length for length, _ in pairs]), np.array([count for _, count in pairs])


def _median(lengths: npt.NDArray[np.int64], counts: npt.NDArray[np.int64]) -> float:
    ends, total = np.cumsum(counts), int(counts.sum())
    middle = np.searchsorted(ends, [(total - 1) // 2, total // 2], side="right")
    return float(lengths[middle].mean())


def _left_out(source: SourceSummary) -> dict[str, int]:
    """By rule; the numbers and what is left add up to what was read."""
    dedup = source.stages["dedup"]
    found = {"unreadable": source.rejects, **source.cleaned}
    found |= {"exact duplicate": int(dedup["exact"]), "near duplicate": int(dedup["near"])}
    return found | ({"quality": source.low_quality} if "quality" in source.stages else {})


def stats_tables(stats: CorpusStats) -> list[Table]:
    """For the terminal."""
    rows = [
        (
            d.source,
            d.side,
            f"{d.weight:.1%}" if d.side == "train" else "",
            f"{d.documents:,}",
            f"{d.tokens:,}",
            f"{d.bytes_per_token:.2f}",
            f"{d.median:,.0f}",
            f"{d.mean:,.0f}",
            f"{d.longest:,}",
        )
        for d in stats.datasets
    ]
    heads = ("source", "side", "weight", "documents", "tokens", "bytes/token", "median", "mean", "longest")
    tables = [make_table(f"{stats.name}: documents, in tokens", heads, rows)]
    rules = list(dict.fromkeys(rule for found in stats.left_out.values() for rule in found))
    names = list(stats.left_out)
    losses = [[rule, *(f"{stats.left_out[name].get(rule, 0):,}" for name in names)] for rule in rules]
    losses.append(["of", *(f"{stats.documents_read[name]:,}" for name in names)])
    tables.append(make_table("left out", ["rule", *names], losses))
    return tables


def plot_stats(stats: CorpusStats, path: Path) -> Path:
    """Lengths, tokens, bytes a token and what was left out, as PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 8), constrained_layout=True)
    FigureCanvasAgg(figure)
    (lengths, tokens), (ratios, losses) = figure.subplots(2, 2)
    train = [d for d in stats.datasets if d.side == "train"]
    for d in stats.datasets:
        style = "-" if d.side == "train" else ":"
        share = np.array(d.lengths) / max(1, d.documents)
        last = max(index for index, count in enumerate(d.lengths) if count) + 1
        lengths.step(_LENGTH_EDGES[: last + 1], [*share[:last], 0], style, where="post", label=f"{d.source} {d.side}")
    lengths.set(xscale="log", title="length of documents", xlabel="tokens", ylabel="share of documents")
    _bars(tokens, [d.source for d in train], [d.tokens for d in train], "training tokens")
    weighed = sum(d.tokens for d in train)
    for index, d in enumerate(train):
        tokens.text(d.tokens, index, f" {d.tokens / weighed:.0%} of tokens, weight {d.weight:.0%}", va="center")
    tokens.margins(x=0.6)
    _bars(ratios, [f"{d.source} {d.side}" for d in stats.datasets], [d.bytes_per_token for d in stats.datasets],
          "bytes per token")  # fmt: skip
    bottom = np.zeros(len(stats.left_out))
    rules = dict.fromkeys(rule for found in stats.left_out.values() for rule in found)
    for rule in rules:
        share = np.array([f.get(rule, 0) / max(1, stats.documents_read[n]) for n, f in stats.left_out.items()])
        if share.any():
            losses.barh(list(stats.left_out), 100 * share, left=100 * bottom, label=rule)
            bottom += share
    losses.set(title="left out, % of records read", xlim=(0, max(1.0, 130 * float(bottom.max(initial=0)))))
    for axis in (lengths, losses):
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
    for axis in (lengths, tokens, ratios, losses):
        axis.grid(alpha=0.3)
    figure.suptitle(stats.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path


def _bars(axis: Any, names: list[str], values: list[float] | list[int], title: str) -> None:
    axis.barh(names, values)
    axis.set(title=title)
    axis.invert_yaxis()
