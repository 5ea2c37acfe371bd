"""Shards: the shuffle is one sort of all documents, every document is in it once, and knows where it came from."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.corpus import CorpusConfig
from data_prep.documents import cleaned, digest, heldout_limit
from data_prep.format import TokenStream
from data_prep.manifest import read_manifest
from data_prep.pipeline import prepare
from data_prep.readers import Document, read_unit
from data_prep.storage import save_array
from data_prep.tokenizer import Tokenizer
from data_prep.tokenizing import PIECE, plan_task
from data_prep.units import cut_into_units, list_files
from tests.data_prep.mixed import lines, pieces, tree_hashes

MakeConfig = Callable[..., CorpusConfig]
Shuffled = list[tuple[int, str, Document]]  # (order, text, where from)
BINS = 2**20
TOKENIZER = {"kind": "train_sentencepiece", "vocab_size": 400, "sample_bytes": 60_000}


def config_of(make: MakeConfig, folder: Path, output: Path, shard_tokens: int, **changes: Any) -> CorpusConfig:
    """A source of many files and one of many lines, some of them awkward; nothing is left out as a duplicate."""
    if not folder.exists():
        (folder / "tree").mkdir(parents=True)
        for number, text in enumerate(pieces("json")[:50]):
            (folder / "tree" / f"{number:03d}.txt").write_text(text, encoding="utf-8")
        (folder / "tree" / "awkward.txt").write_bytes("\ufeffdos\r\nline e\u0301nds\x00\r\n".encode())
        (folder / "tree" / "broken.txt").write_bytes(b"\xff\xfe")
        texts = pieces("email")[:70]
        body = lines([*texts[:40], "twice", "twice", *texts[40:]])
        (folder / "a.jsonl").write_bytes(body + b"\ngarbage\n" + lines(["a last one", "", "\x00\x01"]))
        (folder / "b.jsonl").write_bytes(lines(["twice", "word " * 9_000, *pieces("logging")[:20]]))
    sources = [
        {"kind": "text_tree", "name": "tree", "path": str(folder / "tree")},
        {"kind": "jsonl", "name": "lines", "path": str(folder / "?.jsonl")},
    ]
    off = {"exact": False, "near": None}
    tree = {"tokenizer": TOKENIZER, "deduplicate": off, "shard_tokens": shard_tokens}
    return make(output, sources=sources, **{**tree, **changes})


def slow_shuffle(config: CorpusConfig, number: int) -> dict[str, Shuffled]:
    """The documents of a source on each side, in the order of their shards: one sort."""
    source = config.sources[number]
    sides: dict[str, Shuffled] = {"train": [], "heldout": []}
    whole = config.model_copy(update={"unit_bytes": 10**9})
    for unit in cut_into_units(whole, [list_files(source) for source in config.sources]):
        for record in read_unit(source, unit, 10**6) if unit.source == number else ():
            if isinstance(record, Document) and (text := cleaned(config, record)):
                side, order = digest(text.encode(), config.seed)
                sides["heldout" if side < heldout_limit(config) else "train"].append((order, text, record))
    return {side: sorted(found, key=lambda document: document[0]) for side, found in sides.items()}


def tokens_of(config: CorpusConfig, found: Shuffled) -> list[list[int]]:
    """Of each document, EOS behind it."""
    tokenizer = Tokenizer(Path(config.output) / "tokenizer")
    return [[*tokenizer.encode(text).tolist(), tokenizer.eos_id] for _, text, _ in found]


def tokens_by_bin(found: Shuffled, tokens: list[list[int]]) -> list[int]:
    """Documents are never parted that share the first 20 bits of their order, as equal texts do."""
    bins: dict[int, int] = {}
    for (order, *_), ids in zip(found, tokens):
        bins[order >> 44] = bins.get(order >> 44, 0) + len(ids)
    return list(bins.values())


def greedy(bins: list[int], shard_tokens: int) -> list[list[int]]:
    """The slow twin of the cut: one bin after the other, a new shard when it does not fit."""
    shards: list[list[int]] = []
    for tokens in bins:
        if shards and sum(shards[-1]) + tokens <= shard_tokens:
            shards[-1].append(tokens)
        else:
            shards.append([tokens])
    return shards


@pytest.mark.parametrize("shard_tokens", [500, 5_000, 10**8])
def test_the_shuffle_is_one_sort(
    tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig, shard_tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    config = config_of(make_config, folder / "in", folder / "out", shard_tokens, unit_bytes=20_000)
    summary = prepare(config)
    assert summary is not None
    stored = 0
    for number, source in enumerate(config.sources):
        for side, found in slow_shuffle(config, number).items():
            dataset = folder / "out" / side / source.name
            stream, tokens = TokenStream(dataset), tokens_of(config, found)
            assert stream.read(0, stream.num_tokens).tolist() == [token for ids in tokens for token in ids]
            shards = [sum(bins) for bins in greedy(tokens_by_bin(found, tokens), shard_tokens)]
            sizes = [(shard.name, shard.tokens) for shard in read_manifest(dataset).shards]
            assert sizes == [(f"shard-{index:05d}", size) for index, size in enumerate(shards)]
            check_origins(stream, Tokenizer(folder / "out" / "tokenizer"), found, list_files(source))
            stored += len(found)
    assert stored == sum(row.documents for row in summary.datasets) == sum(map(len, slow_texts(config)))


def slow_texts(config: CorpusConfig) -> list[list[str]]:
    """What is fit in each source, read with the standard library alone."""
    files = [list_files(source) for source in config.sources]
    tree = [path.read_bytes().decode() for path in files[0] if path.stem != "broken"]
    raw = [line for path in files[1] for line in path.read_bytes().split(b"\n") if line and line != b"garbage"]
    return [tree, [text for line in raw if (text := json.loads(line)["text"]).strip("\x00\x01")]]


def check_origins(stream: TokenStream, tokenizer: Tokenizer, found: Shuffled, files: list[Path]) -> None:
    places = stream.locate(0, stream.num_tokens)
    assert len(places) == len(found)
    for place, (_, text, record) in zip(places, found):
        ids = stream.read(place.begin, place.tokens)
        assert ids[-1] == stream.eos_id and tokenizer.decode(ids[:-1]) == text
        origin = stream.origin(place.shard, place.document)
        assert origin == (str(files[record.file]), record.record)
        raw = Path(origin[0]).read_bytes()  # and once more by hand
        original = json.loads(raw.split(b"\n")[origin[1]])["text"] if origin[0].endswith("jsonl") else raw.decode()
        assert text == original or ("awkward" in origin[0] and text.endswith("dos\nline \u00e9nds\n"))


@pytest.mark.parametrize("changes", [{"unit_bytes": 3_000}, {"workers": 2}], ids=["units", "workers"])
def test_units_and_workers_do_not_show(
    tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig, changes: dict[str, int]
) -> None:
    folder = tmp_path_factory.mktemp("units")
    outputs = []
    for name, more in (("a", {"unit_bytes": 40_000}), ("b", changes)):
        prepare(config_of(make_config, folder / "in", folder / name, 5_000, **more))
        outputs.append(tree_hashes(folder / name))
    assert outputs[0] == outputs[1]


def test_a_remade_tokenizer_is_the_one_used(tmp_path: Path, make_config: MakeConfig) -> None:
    for vocab_size in (400, 450):  # in one process, which has the first still open
        tokenizer = {**TOKENIZER, "vocab_size": vocab_size}
        config = config_of(make_config, tmp_path / "in", tmp_path / "out", 5_000, tokenizer=tokenizer)
        prepare(config, redo=True)
        expected = [token for ids in tokens_of(config, slow_shuffle(config, 1)["train"]) for token in ids]
        stream = TokenStream(tmp_path / "out" / "train" / "lines")
        assert stream.read(0, stream.num_tokens).tolist() == expected
        assert max(expected) >= vocab_size - 50


# ---- the rule of cuts, on its own ------------------------------------------------------------------------
def write_unit(folder: Path, unit: str, documents: list[tuple[int, int]]) -> None:
    """What `encode` leaves of a unit, for documents of these (bin, tokens)."""
    order = np.array([bin_ << 44 | number for number, (bin_, _) in enumerate(documents)], np.uint64)
    sequence = np.argsort(order, kind="stable")
    rows = np.zeros(len(documents), PIECE)
    rows["tokens"] = [documents[number][1] for number in sequence]
    save_array(folder / f"{unit}.train.order.npy", order[sequence])
    save_array(folder / f"{unit}.train.pieces.npy", rows)


PLACES = st.sampled_from([0, 1, 2, 3, 4, 5, BINS // 2, BINS - 2, BINS - 1]) | st.integers(0, BINS - 1)
UNITS = st.lists(st.lists(st.tuples(PLACES, st.integers(1, 30)), max_size=8), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(units=UNITS.filter(any), shard_tokens=st.integers(1, 60))
def test_shards_take_whole_bins_as_many_as_fit(
    tmp_path_factory: pytest.TempPathFactory, units: list[list[tuple[int, int]]], shard_tokens: int
) -> None:
    folder = tmp_path_factory.mktemp("plan")
    names = [f"u{number}" for number in range(len(units))]
    for name, documents in zip(names, units):
        write_unit(folder, name, documents)
    cuts = plan_task(folder, names, "train", shard_tokens)["cuts"]
    full: dict[int, int] = {}
    for bin_, tokens in (document for documents in units for document in documents):
        full[bin_] = full.get(bin_, 0) + tokens
    assert cuts[0] == 0 and cuts[-1] == BINS and all(a < b for a, b in pairwise(cuts))
    shards = [[full[bin_] for bin_ in sorted(full) if a <= bin_ < b] for a, b in pairwise(cuts)]
    assert shards == greedy([full[bin_] for bin_ in sorted(full)], shard_tokens)
    assert all(sum(shard) <= shard_tokens or len(shard) == 1 for shard in shards)


def test_documents_of_one_bin_stay_together(tmp_path: Path) -> None:
    """A bin fuller than a shard is a shard, whatever is in it."""
    write_unit(tmp_path, "u", [(7, 5), (7, 5), (7, 5), (9, 1)])
    assert plan_task(tmp_path, ["u"], "train", 8)["cuts"] == [0, 8, BINS]
