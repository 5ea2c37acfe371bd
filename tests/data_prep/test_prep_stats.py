"""`glam prep stats`: its numbers add up, and what it draws is a picture."""

from __future__ import annotations

import json
import os
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from configs.errors import UserError
from data_prep.format import TokenStream
from data_prep.pipeline import prepare
from data_prep.stats import CorpusStats, corpus_stats, plot_stats, stats_tables
from data_prep.summary import PrepSummary
from tests.data_prep.mixed import mixed_config


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus in which every stage leaves something out."""
    folder = tmp_path_factory.mktemp("stats")
    assert prepare(mixed_config(folder / "sources", folder / "out", unit_bytes=10**6)) is not None
    return folder / "out"


def rendered(stats: CorpusStats) -> str:
    console = Console(record=True, width=160, file=open(os.devnull, "w"))  # noqa: SIM115
    for table in stats_tables(stats):
        console.print(table)
    return console.export_text()


def test_what_was_read_is_left_out_or_there(mixed: Path) -> None:
    stats = corpus_stats(mixed)
    assert {"unreadable", "exact duplicate", "near duplicate", "quality"} <= set(stats.left_out["web"])
    rules = {rule for found in stats.left_out.values() for rule, count in found.items() if count}
    assert {"unreadable", "exact duplicate", "near duplicate", "quality"} < rules, "and a rule of cleaning"
    for name, left_out in stats.left_out.items():
        there = sum(d.documents for d in stats.datasets if d.source == name)
        assert stats.documents_read[name] == sum(left_out.values()) + there > 0
    rejects = [line for path in (mixed / "rejects").glob("*.jsonl") for line in path.read_text().splitlines()]
    for name, left_out in stats.left_out.items():
        assert sum(left_out.values()) == sum(json.loads(line)["source"] == name for line in rejects)


def test_lengths_are_those_of_the_tokens(mixed: Path) -> None:
    """Counted by the EOS in the tokens, which `stats` itself does not read."""
    stats = corpus_stats(mixed)
    assert len(stats.datasets) == len(PrepSummary.load(mixed).datasets)
    for d in stats.datasets:
        stream = TokenStream(mixed / d.side / d.source)
        ends = np.flatnonzero(stream.read(0, stream.num_tokens) == stream.eos_id)
        lengths = np.diff(ends, prepend=-1)
        assert (d.documents, d.tokens, d.longest) == (lengths.size, lengths.sum(), lengths.max())
        assert (d.median, d.mean) == (np.median(lengths), pytest.approx(lengths.mean()))
        octaves = [int(length).bit_length() - 1 for length in lengths]
        assert d.lengths == [octaves.count(octave) for octave in range(len(d.lengths))]
        assert sum(d.lengths) == d.documents
        assert stream.manifest is not None and d.bytes_per_token == stream.manifest.text_bytes / d.tokens
        assert 2 ** len(d.lengths) >= 2**31, "any length the format holds has its place"
    assert sum(d.weight for d in stats.datasets) == pytest.approx(1)
    assert {d.source: d.weight for d in stats.datasets if d.side == "train"} == {"web": 0.6, "books": 0.2, "table": 0.2}


def test_the_tables_show_the_numbers(mixed: Path) -> None:
    stats = corpus_stats(mixed)
    text = rendered(stats)
    for d in stats.datasets:
        (row,) = [line for line in text.splitlines() if d.source in line and d.side in line and f"{d.tokens:,}" in line]
        assert f"{d.documents:,}" in row and f"{d.longest:,}" in row
    for rule in (rule for found in stats.left_out.values() for rule in found):
        (row,) = [line for line in text.splitlines() if f" {rule} " in line]
        assert all(f" {found.get(rule, 0):,} " in row for found in stats.left_out.values())
    assert json.loads(json.dumps(stats.to_json()))["documents_read"] == stats.documents_read


@pytest.mark.parametrize("filtered", [True, False])
def test_the_picture_is_one(mixed: Path, corpus: PrepSummary, tmp_path: Path, filtered: bool) -> None:
    """Also of a corpus that left nothing out."""
    path = plot_stats(corpus_stats(mixed if filtered else corpus.output), tmp_path / "deep" / "stats.png")
    pixels = matplotlib.image.imread(path)
    assert pixels.shape[0] > 400 and pixels.shape[1] > 800
    for half in (np.s_[:440, :715], np.s_[:440, 715:], np.s_[440:, :715], np.s_[440:, 715:]):
        assert pixels[half][..., :3].std() > 0.05, "each panel shows something"


def test_no_corpus_no_numbers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"summary\.json"):
        corpus_stats(tmp_path)
