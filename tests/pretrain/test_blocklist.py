"""Samples on the blocklist: never drawn again, whenever they were put there; the file; what it says of documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.data import DataConfig
from configs.errors import UserError
from pretrain.blocklist import Blocked, append_lines, from_json, read_blocklist, to_json, united
from pretrain.data import Cursor, Sampler, Source
from pretrain.explain import batch_documents
from pretrain.metrics import Metrics

MakeData = Callable[..., DataConfig]
S = 64


def blocked(sampler: Sampler, name: str, first: int, last: int) -> Blocked:
    source = sampler.sources[name]
    return Blocked(name, source.stream.identity, source.length, source.seed, 1, first, last)


# ---- drawing ------------------------------------------------------------------------------------------------------
@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 12)), max_size=6), st.lists(st.integers(1, 60), min_size=1)
)
def test_blocked_samples_are_stepped_over_and_the_mixture_stays(
    make_data: MakeData, ranges: list[tuple[int, int]], batches: list[int]
) -> None:
    """Order and mixture are those of a run without a list, with the holes closed up source by source."""
    config = make_data(json=1.0, email=2.0)
    free, listed = Sampler(config, S), Sampler(config, S)
    listed.block([blocked(listed, "json", first, first + more) for first, more in ranges])
    holes = {number for first, more in ranges for number in range(first, first + more + 1)}
    json_windows = {listed.sources["json"].window_of(number): number for number in reversed(sorted(holes))}
    wanted, found = [], []
    for size in batches:
        wanted += [name for name, _ in free.next_batch(size)]
        found += listed.next_batch(size)
    assert [name for name, _ in found] == wanted
    drawn = [number for name, number in found if name == "json"]
    source = listed.sources["json"]

    def allowed(number: int) -> bool:
        return number < json_windows.get(source.window_of(number), number + 1)

    assert drawn == [number for number in range(drawn[-1] + 1) if allowed(number)] if drawn else True
    assert holes.isdisjoint(drawn)
    emails = [number for name, number in found if name == "email"]
    assert emails == list(range(len(emails)))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.integers(0, 3), st.integers(5, 60))
def test_blocking_on_the_way_equals_having_known(
    make_data: MakeData, fit: int, bad: int, wasted: int, more: int
) -> None:
    """Draw, meet bad batches, go back to a cursor before them with those on the list: as if known from the start."""
    config, size = make_data(json=3.0, email=1.0), 16
    run, kept = Sampler(config, S), []
    for _ in range(fit):
        kept.append(run.next_batch(size))
    saved = Cursor(**json.loads(json.dumps(vars(run.cursor))))
    for _ in range(wasted):
        kept.append(run.next_batch(size))
    rows = [run.ranges(run.next_batch(size)) for _ in range(bad)]
    entries = [one for row in rows for one in row]
    assert sum(one.count for one in entries) == bad * size
    run.resume(saved)
    run.block(entries)
    kept = kept[:fit] + [run.next_batch(size) for _ in range(more)]
    knowing = Sampler(config, S)
    knowing.block(entries)
    assert [knowing.next_batch(size) for _ in range(fit + more)] == kept
    assert knowing.cursor == run.cursor and knowing.blocklist == run.blocklist


def test_the_text_does_not_come_back_in_a_later_epoch(make_data: MakeData) -> None:
    """Blocked in the second epoch: drawn in the first, never after; the other windows once an epoch, as ever."""
    sampler = Sampler(make_data(json=1.0), S)
    source = sampler.sources["json"]
    n = source.num_samples
    sampler.block([blocked(sampler, "json", n + 5, n + 9)])
    gone = {source.window_of(number) for number in range(n + 5, n + 10)}
    windows = [source.window_of(number) for _, number in sampler.next_batch(n + 2 * (n - len(gone)))]
    assert sorted(windows[:n]) == list(range(n))
    assert not gone & set(windows[n + 5 :])
    for epoch in (windows[n : 2 * n - len(gone)], windows[2 * n - len(gone) :]):
        assert sorted({*epoch, *gone}) == list(range(n)) and len(set(epoch)) == len(epoch)


@pytest.mark.parametrize(("length", "seed"), [(64, 3), (48, 0), (200, 7)])
def test_another_order_or_length_knows_the_text_by_its_place(make_data: MakeData, length: int, seed: int) -> None:
    """No window that is drawn shares an input token with what was blocked, and few others are lost."""
    there = Sampler(make_data(json=1.0), S)
    entry = blocked(there, "json", 10, 13)
    starts = [there.sources["json"].window_of(number) * S for number in range(10, 14)]
    tokens = {token for start in starts for token in range(start, start + S)}
    here = Sampler(make_data(json=1.0, seed=seed), length)
    n = here.sources["json"].num_samples
    here.block([entry])
    drawn = [here.sources["json"].window_of(number) for _, number in here.next_batch(2 * n)]
    assert tokens.isdisjoint(t for w in drawn for t in range(w * length, w * length + length))
    assert n - len(set(drawn)) <= 4 * (S // length + 2)


def test_samples_of_what_is_not_read_here_are_only_remembered(make_data: MakeData) -> None:
    sampler, free = Sampler(make_data(json=1.0), S), Sampler(make_data(json=1.0), S)
    entries = [Blocked("elsewhere", "x", S, 0, 1, 0, 5), Blocked("json", "another identity", S, 0, 1, 0, 5)]
    sampler.block(entries)
    assert sampler.next_batch(50) == free.next_batch(50)
    assert sampler.blocklist == sorted(entries)


def test_a_list_that_leaves_nothing_is_refused(make_data: MakeData) -> None:
    sampler = Sampler(make_data(json=1.0), S)
    n = sampler.sources["json"].num_samples
    sampler.block([blocked(sampler, "json", 0, n - 2)])
    assert len(set(sampler.next_batch(3))) == 3, "one window is left, and comes once an epoch"
    with pytest.raises(UserError, match=f"covers all {n} samples of data source 'json'"):
        sampler.block([blocked(sampler, "json", n - 1, n - 1)])


# ---- entries ------------------------------------------------------------------------------------------------------
@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 1), st.integers(0, 30), st.integers(0, 8))))
def test_united_holds_each_sample_once(ranges: list[tuple[str, int, int, int]]) -> None:
    entries = [Blocked(name, "d", S, 0, rollback, first, first + more) for name, rollback, first, more in ranges]

    def samples(of: list[Blocked]) -> list[tuple[str, int, int]]:
        return [(one.source, one.rollback, number) for one in of for number in range(one.first, one.last + 1)]

    found = united(entries)
    assert sorted(samples(found)) == sorted(set(samples(entries)))
    assert united(found + entries[::-1]) == found, "one form, however they came together"
    for one, other in pairwise(found):
        same = (one.source, one.rollback) == (other.source, other.rollback)
        assert not same or one.last + 1 < other.first, "as few as can be"
    assert from_json(json.loads(json.dumps(to_json(found)))) == found


def row(**changes: Any) -> dict[str, Any]:
    return {"source": "json", "sample": 3, "dataset": "d", "sequence_length": S, "seed": 0, "rollback": 2, **changes}


def test_the_file_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "blocklist.jsonl"
    append_lines(path, [row(sample=4, documents=[{"origin": "a.py"}]), row(sample=3)])
    append_lines(path, [row(sample=9, rollback=3)])
    assert read_blocklist(path, own=True) == [Blocked("json", "d", S, 0, 2, 3, 4), Blocked("json", "d", S, 0, 3, 9, 9)]
    given = read_blocklist(path, own=False)
    assert {one.rollback for one in given} == {0}, "another run's rollbacks are not this one's"
    assert list(tmp_path.iterdir()) == [path], "nothing is left beside it"


@pytest.mark.parametrize(
    "line",
    ["{", "[]", "7", json.dumps(row(sample="3")), json.dumps(row(sample=-1)), json.dumps(row(seed=True)),
     json.dumps({k: v for k, v in row().items() if k != "dataset"})],
)  # fmt: skip
def test_a_line_that_is_none_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "list.jsonl"
    path.write_text(json.dumps(row()) + "\n\n" + line + "\n")
    with pytest.raises(UserError, match=r"list\.jsonl:3"):
        read_blocklist(path, own=True)


def test_a_given_list_must_be_about_the_data(make_data: MakeData, tmp_path: Path) -> None:
    data, path = make_data(json=1.0), tmp_path / "list.jsonl"
    listing = data.model_copy(update={"blocklist": str(path)})
    with pytest.raises(UserError, match="No such file"):
        Sampler(listing, S)
    path.write_text("")
    assert Sampler(listing, S).blocklist == []
    identity = Sampler(data, S).sources["json"].stream.identity
    for wrong, told in ((row(), "as it was in d"), (row(source="gone", dataset=identity), "is about gone")):
        path.write_text(json.dumps(wrong))
        with pytest.raises(UserError, match=told):
            Sampler(listing, S)
    path.write_text(json.dumps(row(dataset=identity)) + "\n" + json.dumps(row(source="gone")))
    assert [number for _, number in Sampler(listing, S).next_batch(6)] == [0, 1, 2, 4, 5, 6]


# ---- explained ----------------------------------------------------------------------------------------------------
def test_explain_follows_a_rollback(make_data: MakeData, tmp_path: Path) -> None:
    """Steps 1-9 fed and recorded, back to step 6 with the samples of 8 and 9 blocked, the start's record dropped."""
    data, size, fed = make_data(json=1.0, email=1.0), 8, {}
    sampler = Sampler(data, S)
    facts = {"data": {**data.model_dump(mode="json"), "blocklist": "gone.jsonl"}, "sequence_length": S}
    facts |= {"batch_tokens": S * size, "layout": {"data": 1, "tensor": 1, "pipeline": 1}}
    facts["datasets"] = {name: source.stream.identity for name, source in sampler.sources.items()}

    def record() -> dict[str, Any]:
        return {**facts, "cursor": vars(sampler.cursor), "blocklist": to_json(sampler.blocklist)}

    with Metrics(tmp_path, 0, 20) as metrics:
        metrics.write("event", 0, {"event": "started", **record()})
        for step in range(1, 8):
            fed[step] = sampler.next_batch(size)
            if step == 6:
                saved = json.loads(json.dumps(vars(sampler.cursor)))
        metrics.write("event", 7, {"event": "started", **record()})
        rows = [sampler.ranges(sampler.next_batch(size)) for _ in range(2)]
        sampler.resume(Cursor(**saved))
        sampler.block([one for row in rows for one in row])
        metrics.go_back(6)
        metrics.write("event", 6, {"event": "rolled_back", **record()})
        for step in range(7, 12):
            fed[step] = sampler.next_batch(size)
            metrics.write("train", step, {"loss": 1.0} if step == 9 else {"cursor": vars(sampler.cursor)})
    for step, chosen in fed.items():
        seen = batch_documents(tmp_path, step)
        for number, (name, sample) in enumerate(chosen):
            parts = [one for one in seen if one.sequence == number]
            source: Source = sampler.sources[name]
            where = source.stream.locate(source.window_of(sample) * S, S + 1)
            assert [(p.source, p.document, p.first_token, p.tokens) for p in parts] == [
                (name, place.document, place.offset, place.tokens) for place in where
            ]
