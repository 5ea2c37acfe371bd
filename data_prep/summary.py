"""What a preparation made: kept as `summary.json`, whose presence says that the corpus is complete."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from configs.errors import UserError

SUMMARY = "summary.json"


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
    """What was left out of one source."""

    source: str
    rejects: int
    duplicates: int


@dataclass(frozen=True)
class PrepSummary:
    """The whole corpus. ``already_prepared`` and ``seconds`` (by stage) tell of this call and are not stored."""

    output: Path
    fingerprint: str
    source_state: str
    tokenizer_sha256: str
    vocab_size: int
    datasets: tuple[SideSummary, ...]
    sources: tuple[SourceSummary, ...]
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
            f"left out of {row.source}: {row.rejects:,} rejects, {row.duplicates:,} duplicates" for row in self.sources
        )
        title = f"{self.output}: vocabulary {self.vocab_size:,}"
        table = Table(title=title, caption="\n".join(left_out), title_justify="left", caption_justify="left")
        table.add_column("source", no_wrap=True)
        table.add_column("side", no_wrap=True)
        for title in ("documents", "tokens", "MB", "bytes/token"):
            table.add_column(title, justify="right", no_wrap=True)
        for row in self.datasets:
            size, ratio = f"{row.text_bytes / 1e6:.1f}", f"{row.text_bytes / row.tokens:.2f}"
            table.add_row(row.source, row.side, f"{row.documents:,}", f"{row.tokens:,}", size, ratio)
        return table
