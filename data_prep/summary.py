"""What a preparation made: kept as `summary.json`, whose presence says that the corpus is complete."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from configs.errors import UserError

SUMMARY = "summary.json"
Counts = dict[str, Any]


@dataclass(frozen=True)
class SideSummary:
    """One dataset: OUTPUT/<side>/<source>."""

    source: str
    side: str
    shards: int
    documents: int
    tokens: int
    text_bytes: int


@dataclass(frozen=True)
class SourceSummary:
    """One source, from what was read to what is left; `stages` holds each stage's own counts."""

    source: str
    weight: float
    files: int
    stages: dict[str, Counts]

    @property
    def rejects(self) -> int:
        """Records that could not be read."""
        return int(self.stages["read"]["rejects"])

    @property
    def cleaned(self) -> dict[str, int]:
        """Documents left out by each rule."""
        return dict(self.stages["clean"]["rules"])

    @property
    def duplicates(self) -> int:
        """Documents left out as like an earlier one."""
        return int(self.stages["dedup"]["exact"] + self.stages["dedup"]["near"])

    @property
    def low_quality(self) -> int:
        """Documents left out by their quality score."""
        return int(self.stages["dedup"]["kept"] - self.stages["quality"]["kept"]) if "quality" in self.stages else 0


@dataclass(frozen=True)
class PrepSummary:
    """The whole corpus. ``already_prepared`` and ``seconds`` (by stage) tell of this call and are not stored."""

    output: Path
    fingerprint: str
    made_from: dict[str, str]  # hashes of the files read, by kind
    tokenizer_sha256: str
    vocab_size: int
    datasets: tuple[SideSummary, ...]
    sources: tuple[SourceSummary, ...]
    classifier: Counts | None = None
    already_prepared: bool = False
    seconds: dict[str, float] = field(default_factory=dict)

    def total(self, side: str, what: str) -> int:
        """A sum over sources, for example ``total("train", "tokens")``."""
        return sum(int(getattr(dataset, what)) for dataset in self.datasets if dataset.side == side)

    def to_json(self) -> bytes:
        """The stored form: the same bytes for the same corpus."""
        tree = dataclasses.asdict(self)
        for transient in ("output", "already_prepared", "seconds"):
            del tree[transient]
        return json.dumps(tree, indent=1).encode() + b"\n"

    @classmethod
    def load(cls, output: Path) -> PrepSummary:
        """Read ``OUTPUT/summary.json``.

        Raises:
            UserError: it is unreadable.
        """
        try:
            tree: dict[str, Any] = json.loads((output / SUMMARY).read_bytes())
            tree["datasets"] = tuple(SideSummary(**row) for row in tree["datasets"])
            tree["sources"] = tuple(SourceSummary(**row) for row in tree["sources"])
            return cls(output=output, already_prepared=True, **tree)
        except (OSError, ValueError, KeyError, TypeError) as error:
            remedy = f"delete {output}, or choose another output=PATH"
            raise UserError(f"{output / SUMMARY}: {error}", "a summary written by `glam prep`", remedy) from None

    def table(self) -> Table:
        """For the terminal: a row for each source and side, below it what was left out."""
        left_out = (
            f"left out of {row.source}: {row.rejects:,} unreadable, {sum(row.cleaned.values()):,} unclean, "
            f"{row.duplicates:,} duplicates" + (f", {row.low_quality:,} by quality" if "quality" in row.stages else "")
            for row in self.sources
        )
        rows = [
            (
                row.source,
                row.side,
                f"{row.documents:,}",
                f"{row.tokens:,}",
                f"{row.text_bytes / 1e6:.1f}",
                f"{row.text_bytes / row.tokens:.2f}",
            )
            for row in self.datasets
        ]
        heads = ("source", "side", "documents", "tokens", "MB", "bytes/token")
        return make_table(f"{self.output}: vocabulary {self.vocab_size:,}", heads, rows, "\n".join(left_out))


def make_table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], caption: str | None = None) -> Table:
    """A table: names to the left, figures to the right."""
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for number, head in enumerate(heads):
        names = all(not row[number][:1].isdigit() for row in rows)
        table.add_column(head, no_wrap=True, justify="left" if names else "right")
    for row in rows:
        table.add_row(*row)
    return table
