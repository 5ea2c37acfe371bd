"""Mixture, order, cursor, held-out windows: relations over a small real corpus."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.data import DataConfig
from configs.errors import UserError
from data_prep.format import TokenStream
from data_prep.tokenizer import Tokenizer
from parallel.topology import Topology
from pretrain.data import (
    Cursor,
    HeldOut,
    Sampler,
    Source,
    check_document_end,
    check_vocabulary,
    cut_batch,
    unigram_nats,
)

MakeData = Callable[..., DataConfig]
S = 64


def named(weights: list[float]) -> dict[str, float]:
    return {f"source{number}": weight for number, weight in enumerate(weights)}


def through_json(cursor: Cursor) -> Cursor:
    """As a checkpoint keeps it."""
    return Cursor(**json.loads(json.dumps(vars(cursor))))


# ---- mixture --------------------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0.001, 1000), min_size=1, max_size=7), st.lists(st.integers(1, 40), min_size=1, max_size=12))
@example([5, 27, 25, 3, 5, 1], [120])  # giving each to whoever is furthest behind strays by 1.015 after 103
@example([0.42, 0.06, 0.28, 0.02, 0.20, 0.02], [500])
def test_mixture_is_within_one_sample_at_every_prefix(
    make_data: MakeData, weights: list[float], batches: list[int]
) -> None:
    sampler = Sampler(make_data(**named(weights)), S)
    share, counts, drawn = {n: w / sum(weights) for n, w in named(weights).items()}, Counter[str](), 0
    for size in batches:
        for name, number in sampler.next_batch(size):
            assert number == counts[name], "each source counts its own samples"
            counts[name] += 1
            drawn += 1
            assert all(abs(counts[n] - share[n] * drawn) <= 1 + 1e-9 for n in share)
    assert sampler.cursor.drawn == {name: counts[name] for name in share}


def test_any_million_tokens_keep_to_the_weights(make_data: MakeData) -> None:
    """Within half a point, in samples of 1,024 tokens: GLaM's six sources (Du et al. 2021, table 3), any window."""
    weights = [0.42, 0.06, 0.28, 0.02, 0.20, 0.02]
    chosen = [name for name, _ in Sampler(make_data(**named(weights)), 1024).next_batch(6000)]
    window = 10**6 // 1024
    for name, weight in named(weights).items():
        counts = np.cumsum([0, *(one == name for one in chosen)])
        shares = (counts[window:] - counts[:-window]) / window
        assert np.abs(shares - weight).max() < 0.005


def test_nothing_is_repeated_before_its_epoch_ends(make_data: MakeData) -> None:
    """Whatever happens to the weights, and whichever sources come and go, between starts."""
    weights: list[dict[str, float]] = [{"a": 1, "b_email": 1}, {"a": 1, "b_email": 9}, {"b_email": 1, "c": 2},
                                       {"a": 5, "b_email": 1, "c": 1}, {"a": 1, "b_email": 1}]  # fmt: skip
    cursor, seen = Cursor(), dict[str, list[int]]()
    for mixture in weights:
        sampler = Sampler(make_data(**mixture), S, through_json(cursor))
        for name, number in sampler.next_batch(90):
            seen.setdefault(name, []).append(sampler.sources[name].window_of(number))
        cursor = sampler.cursor
    sizes = {name: Sampler(make_data(**{name: 1}), S).sources[name].num_samples for name in seen}
    for name, windows in seen.items():
        for start in range(0, len(windows), sizes[name]):
            epoch = windows[start : start + sizes[name]]
            assert len(set(epoch)) == len(epoch), f"{name} repeats within an epoch"
    assert len(seen["b_email"]) > 100 and len(seen["a"]) > 100


def test_batch_size_does_not_change_the_order(make_data: MakeData) -> None:
    data = make_data(a=3, b_email=1.7, c=0.2)
    whole = Sampler(data, S).next_batch(240)
    in_parts = Sampler(data, S)
    assert [sample for size in (1, 7, 32, 200) for sample in in_parts.next_batch(size)] == whole


def test_scale_of_weights_does_not_matter(make_data: MakeData) -> None:
    one, other = Sampler(make_data(a=1, b=3), S), Sampler(make_data(a=2, b=6), S)
    assert one.next_batch(50) == other.next_batch(50)


# ---- cursor ---------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=2, max_size=8), st.data())
def test_resumed_equals_uninterrupted(make_data: MakeData, batches: list[int], data: st.DataObject) -> None:
    config = make_data(a=1.0, b_email=2.5, c=0.3)
    whole = Sampler(config, S)
    expected = [whole.next_batch(size) for size in batches]
    stop = data.draw(st.integers(0, len(batches)))
    first = Sampler(config, S)
    found = [first.next_batch(size) for size in batches[:stop]]
    second = Sampler(config, S, through_json(first.cursor))
    found += [second.next_batch(size) for size in batches[stop:]]
    assert found == expected
    assert np.array_equal(second.read(found[-1]), whole.read(expected[-1]))


def test_changed_weights_keep_what_was_drawn(make_data: MakeData) -> None:
    before = Sampler(make_data(a=1, b=1, c=2), S)
    before.next_batch(40)
    after = Sampler(make_data(a=1, b=9), S, through_json(before.cursor))
    chosen = after.next_batch(100)
    for name, start, count in (("a", 10, 10), ("b", 10, 90)):
        assert [number for n, number in chosen if n == name] == list(range(start, start + count))
    assert after.cursor.drawn == {"a": 20, "b": 100, "c": 20}, "a source that is left out keeps its place"
    again = Sampler(make_data(a=1, b=1, c=2), S, through_json(after.cursor))
    assert dict(reversed(again.next_batch(4))) == {"a": 20, "b": 100, "c": 20}


def test_cursor_is_not_shared_between_samplers(make_data: MakeData) -> None:
    cursor = Cursor()
    Sampler(make_data(a=1), S, cursor).next_batch(3)
    assert cursor == Cursor()


@pytest.mark.parametrize("degrees", [(1, 2, 4), (4, 1, 2)])
def test_order_is_independent_of_the_number_of_ranks(make_data: MakeData, degrees: tuple[int, ...]) -> None:
    """Slices of the ranks put together are the global batch, also where the number of ranks changes on the way."""
    from pretrain.loop import next_micro_batches

    config = SimpleNamespace(train=SimpleNamespace(batch_sequences=8, micro_batch_sequences=2))
    data = make_data(a=1.0, b_email=2.0)
    reference, cursor = Sampler(data, S), Cursor()
    for degree in degrees:
        pieces: list[Any] = []
        for rank in range(degree):
            sampler = Sampler(data, S, cursor)
            engine = SimpleNamespace(topology=Topology(rank, data=degree), reads_data=True)
            run: Any = SimpleNamespace(config=config, sampler=sampler, engine=engine)
            micro_batches = next_micro_batches(run)
            assert len(micro_batches) == 8 // degree // 2
            pieces += [(tokens.numpy(), labels.numpy()) for tokens, labels in micro_batches]
        # A stage between the first and the last reads nothing, yet its cursor goes on.
        idle: Any = SimpleNamespace(
            config=config, sampler=Sampler(data, S, cursor), engine=SimpleNamespace(reads_data=False)
        )
        assert next_micro_batches(idle) == [] and through_json(idle.sampler.cursor) == through_json(sampler.cursor)
        cursor = through_json(sampler.cursor)
        windows = reference.read(reference.next_batch(8))
        assert np.array_equal(np.concatenate([tokens for tokens, _ in pieces]), windows[:, :-1])
        assert np.array_equal(np.concatenate([labels for _, labels in pieces]), windows[:, 1:])


# ---- epochs ---------------------------------------------------------------------------------------------
def test_each_window_once_an_epoch_and_in_another_order_in_the_next(corpus: Path) -> None:
    source = Source("json", str(corpus / "train" / "json"), 128, seed=0)
    n = source.num_samples
    windows = {source.window(index).tobytes(): index for index in range(n)}
    assert len(windows) == n > 100, "the windows of this corpus differ, so each is known by its tokens"
    epochs = [[windows[source.sample(e * n + k).tobytes()] for k in range(n)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


@pytest.mark.parametrize("name", ["json", "a-name-of-a-source-" * 5])
def test_order_depends_on_seed_name_and_epoch(corpus: Path, name: str) -> None:
    path = str(corpus / "train" / "json")

    def order(name: str, seed: int, epoch: int = 0) -> list[bytes]:
        source = Source(name, path, S, seed)
        return [source.sample(epoch * source.num_samples + k).tobytes() for k in range(20)]

    base = order(name, 0)
    assert base == order(name, 0)
    assert base != order(name, 1) and base != order(name + "x", 0) and base != order(name, 0, epoch=1)


def test_windows_overlap_by_one_token_and_cover_the_stream(corpus: Path) -> None:
    source = Source("json", str(corpus / "train" / "json"), S, seed=0)
    stream = TokenStream(corpus / "train" / "json")
    n = source.num_samples
    labels = np.concatenate([source.window(index)[1:] for index in range(n)])
    assert np.array_equal(labels, stream.read(1, n * S)), "every token but the first is a label once"
    assert 0 <= stream.num_tokens - 1 - n * S < S, "less than a window is left over"


def test_epochs_count_use(make_data: MakeData) -> None:
    sampler = Sampler(make_data(json=1.0, email=1.0), S)
    n = {name: source.num_samples for name, source in sampler.sources.items()}
    sampler.next_batch(2 * n["json"])
    assert sampler.epochs() == {"json": 1.0, "email": n["json"] / n["email"]}


def test_source_shorter_than_a_window_is_refused(corpus: Path) -> None:
    tokens = TokenStream(corpus / "train" / "json").num_tokens
    assert Source("json", str(corpus / "train" / "json"), tokens - 1, 0).num_samples == 1
    with pytest.raises(UserError, match=f"{tokens} tokens") as met:
        Source("json", str(corpus / "train" / "json"), tokens, 0)
    assert str(tokens + 1) in met.value.expected


# ---- held-out -------------------------------------------------------------------------------------------
def test_heldout_is_the_first_windows_in_order(corpus: Path) -> None:
    path = next((corpus / "heldout").iterdir())
    heldout = HeldOut([str(path)], S, num_sequences=12)
    stream = TokenStream(path)
    assert np.array_equal(heldout.read(), np.stack([stream.read(i * S, S + 1) for i in range(12)]))
    assert np.array_equal(heldout.read(), HeldOut([str(path)], S, num_sequences=12).read())


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_heldout_parts_make_the_whole(make_data: MakeData, parts: int) -> None:
    heldout = HeldOut(make_data(a=1).heldout, S, num_sequences=23, multiple=parts)
    assert len(heldout) == 23 // parts * parts
    assert np.array_equal(np.concatenate([heldout.read(part, parts) for part in range(parts)]), heldout.read())


def test_heldout_spans_folders(corpus: Path) -> None:
    paths = [str(corpus / "train" / "json"), str(corpus / "train" / "email")]
    sizes = [Source(path, path, S, 0).num_samples for path in paths]
    heldout = HeldOut(paths, S, num_sequences=10**9)
    assert len(heldout) == sum(sizes)
    assert np.array_equal(heldout.read()[sizes[0]], TokenStream(paths[1]).read(0, S + 1))


def test_heldout_too_short_for_the_ranks_is_refused(make_data: MakeData) -> None:
    with pytest.raises(UserError, match="at least 1000000"):
        HeldOut(make_data(a=1).heldout, S, num_sequences=10**9, multiple=10**6)


def test_heldout_bytes_are_those_of_the_text(corpus: Path) -> None:
    """Bytes behind the labels; over whole documents that is the length of the decoded text."""
    path = next((corpus / "heldout").iterdir())
    stream, tokenizer = TokenStream(path), Tokenizer(corpus / "tokenizer")
    heldout = HeldOut([str(path)], S, num_sequences=20)
    table = tokenizer.token_bytes()
    labels = stream.read(1, len(heldout) * S)
    assert heldout.text_bytes() == sum(int(table[token]) for token in labels)
    # A window that begins and ends within ASCII text decodes on its own.
    whole = [w for w in heldout.read()[:, 1:] if "\ufffd" not in tokenizer.decode(w)]
    assert len(whole) > 10
    assert sum(len(tokenizer.decode(w).encode()) for w in whole) == sum(int(table[w].sum()) for w in whole)


def test_heldout_bytes_are_unknown_without_a_tokenizer(corpus: Path, tmp_path: Path) -> None:
    """A pair as Megatron leaves it: tokens, and no word of what made them."""
    for kind in ("bin", "idx"):
        source = next((corpus / "heldout").iterdir()) / f"shard-00000.{kind}"
        (tmp_path / f"pair.{kind}").write_bytes(source.read_bytes())
    assert HeldOut([str(tmp_path / "pair")], S, num_sequences=4).text_bytes() is None


# ---- small parts ----------------------------------------------------------------------------------------
@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 8))
def test_cut_batch_shifts_labels_by_one(sequences: int, length: int, micro: int) -> None:
    windows = np.arange(sequences * (length + 1)).reshape(sequences, length + 1)
    parts = list(cut_batch(windows, micro))
    assert [len(tokens) for tokens, _ in parts[:-1]] == [micro] * (len(parts) - 1)
    assert np.array_equal(np.concatenate([tokens for tokens, _ in parts]), windows[:, :length])
    assert all(np.array_equal(labels, tokens + 1) for tokens, labels in parts)


def test_vocabulary_must_hold_the_ids() -> None:
    check_vocabulary({"web": 512, "foreign": None}, 512)
    with pytest.raises(UserError) as met:
        check_vocabulary({"web": 513, "foreign": None}, 512)
    assert all(part in met.value.found for part in ("'web'", "513", "512")) and "513" in met.value.remedy


def test_documents_must_end_as_the_model_is_told(make_data: MakeData) -> None:
    ends = Sampler(make_data(json=1), S).document_ends
    assert ends == {"json": 1}
    check_document_end(ends | {"foreign": None}, 1)
    check_document_end(ends, None)
    with pytest.raises(UserError) as met:
        check_document_end(ends, 2)
    assert "end with token 1" in met.value.found and "document_end=2" in met.value.found


def test_vocabulary_of_each_source_is_known(make_data: MakeData) -> None:
    assert Sampler(make_data(json=1, email=1), S).vocab_sizes == {"json": 512, "email": 512}


def test_unigram_is_the_entropy_of_counts(make_data: MakeData, corpus: Path) -> None:
    """Counted token by token, in plain Python."""
    data = make_data(json=1.0)
    sampler, heldout = Sampler(data, S), HeldOut(data.heldout, S, num_sequences=16)
    stream = TokenStream(corpus / "train" / "json")
    counts = Counter(stream.read(0, stream.num_tokens).tolist())
    total = sum(counts.values()) + 512
    labels = [token for window in heldout.read().tolist() for token in window[1:]]
    expected = -sum(math.log((counts[token] + 1) / total) for token in labels) / len(labels)
    assert unigram_nats(sampler, heldout, 512) == pytest.approx(expected, rel=1e-12)
    assert 0 < expected < math.log(512)


def test_unigram_spreads_a_count_over_unseen_entries(make_data: MakeData) -> None:
    """A larger vocabulary than the data's only adds entries nobody met: the baseline gets a little worse."""
    data = make_data(json=1.0)
    sampler, heldout = Sampler(data, S), HeldOut(data.heldout, S, num_sequences=16)
    small, large = unigram_nats(sampler, heldout, 512), unigram_nats(sampler, heldout, 5120)
    tokens = sampler.sources["json"].stream.num_tokens
    assert large - small == pytest.approx(math.log((tokens + 5120) / (tokens + 512)), rel=1e-9)
