"""`glam prep explain`: the documents it names are those the step was fed, whatever changed between starts."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from configs.data import DataConfig
from configs.errors import UserError
from data_prep.tokenizer import Tokenizer
from parallel.topology import Topology
from pretrain.data import Cursor, Sampler, Windows
from pretrain.explain import batch_documents
from pretrain.metrics import Metrics

MakeData = Callable[..., DataConfig]
S, SEQUENCES = 64, 8


def run_steps(
    run_dir: Path, data: DataConfig, cursor: Cursor, first: int, last: int, layout: dict[str, int], every: int = 3
) -> tuple[Cursor, list[Windows]]:
    """What the loop records of steps first..last, and what it fed them."""
    sampler, fed = Sampler(data, S, cursor), []
    with Metrics(run_dir, first - 1, 100) as metrics:
        start = {"data": data.model_dump(mode="json"), "sequence_length": S, "batch_tokens": S * SEQUENCES}
        cursor_now = {"cursor": dataclasses.asdict(sampler.cursor)}
        start["datasets"] = {name: source.stream.identity for name, source in sampler.sources.items()}
        metrics.write("event", first - 1, {"event": "started", **cursor_now, **start, "layout": layout})
        for step in range(first, last + 1):
            fed.append(sampler.read(sampler.next_batch(SEQUENCES)))
            if step % every == 0 or step == last:
                metrics.write("train", step, {"loss": 1.0, "cursor": dataclasses.asdict(sampler.cursor)})
    return sampler.cursor, fed


def test_named_documents_hold_the_tokens_that_were_fed(make_data: MakeData, corpus: Path, tmp_path: Path) -> None:
    """Over a change of weights, a source more, and another number of ranks; every token of every step."""
    one = {"data": 2, "tensor": 1, "pipeline": 1}
    cursor, fed = run_steps(tmp_path, make_data(json=1), Cursor(), 1, 7, one)
    two = {"data": 4, "tensor": 2, "pipeline": 1}
    _, more = run_steps(tmp_path, make_data(json=1, email=3), cursor, 8, 12, two)
    tokenizer = Tokenizer(corpus / "tokenizer")
    for step, windows in enumerate(fed + more, start=1):
        seen = batch_documents(tmp_path, step)
        assert {one.source for one in seen} == ({"json"} if step < 8 else {"json", "email"})
        for number, window in enumerate(windows):
            parts = [one for one in seen if one.sequence == number]
            assert sum(part.tokens for part in parts) == S + 1
            assert parts[0].data_rank == number // (SEQUENCES // (2 if step < 8 else 4))
            at = 0
            for part in parts:
                text = Path(part.origin).read_text(encoding="utf-8")
                ids = np.append(tokenizer.encode(text), tokenizer.eos_id)
                expected = ids[part.first_token : part.first_token + part.tokens]
                assert np.array_equal(window[at : at + part.tokens], expected)
                assert text.split("\n")[0].startswith(part.first_line[:20]) or part.first_line in text
                at += part.tokens


@pytest.mark.parametrize("context", [None, 1, 2])
def test_ranks_together_read_the_batch(make_data: MakeData, tmp_path: Path, context: int | None) -> None:
    """Also in runs that recorded no context degree."""
    layout = {"data": 2, "tensor": 2, "pipeline": 2} | ({"context": context} if context else {})
    run_steps(tmp_path, make_data(a=1, b_email=1), Cursor(), 1, 5, layout)
    whole = batch_documents(tmp_path, 4)
    by_rank = {rank: batch_documents(tmp_path, 4, rank) for rank in range(8 * (context or 1))}
    for rank, part in by_rank.items():
        data_rank = Topology(rank, 2, 2, 2, context=context or 1).data_rank
        assert part == [one for one in whole if one.data_rank == data_rank]
    assert {one.data_rank for one in whole} == {0, 1}


def test_a_dropped_step_is_told_from_the_run_that_made_it_again(make_data: MakeData, tmp_path: Path) -> None:
    """A crash after step 9, resumed from step 6 with other weights: step 8 is the second one's."""
    layout = {"data": 1, "tensor": 1, "pipeline": 1}
    run_steps(tmp_path, make_data(json=1), Cursor(), 1, 9, layout)
    half = Sampler(make_data(json=1), S)
    for _ in range(6):
        half.next_batch(SEQUENCES)
    run_steps(tmp_path, make_data(email=1), half.cursor, 7, 10, layout)
    assert {one.source for one in batch_documents(tmp_path, 6)} == {"json"}
    assert {one.source for one in batch_documents(tmp_path, 8)} == {"email"}


def test_what_cannot_be_told_is_refused(make_data: MakeData, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        batch_documents(tmp_path, 1)
    run_steps(tmp_path, make_data(a=1), Cursor(), 1, 4, {"data": 2, "tensor": 1, "pipeline": 1})
    for step in (0, 5):
        with pytest.raises(UserError, match="recorded steps 1 to 4"):
            batch_documents(tmp_path, step)
    with pytest.raises(UserError, match="0 <= rank < 2"):
        batch_documents(tmp_path, 2, rank=2)
