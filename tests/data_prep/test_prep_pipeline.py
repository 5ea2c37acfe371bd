"""The whole preparation: nothing lost, the same files however it is run, what is in the way is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from rich.console import Console

from configs.corpus import CorpusConfig, TextTree
from configs.data import DataConfig
from configs.errors import UserError
from data_prep import pipeline, tokenizing
from data_prep.format import TokenStream
from data_prep.pipeline import prepare
from data_prep.readers import Document, read_unit
from data_prep.storage import only_writer
from data_prep.summary import PrepSummary
from data_prep.tokenizer import Tokenizer
from data_prep.units import cut_into_units, list_files
from data_prep.verify import verify
from tests.data_prep.mixed import tree_hashes

MakeConfig = Callable[..., CorpusConfig]
JSON_AND_EMAIL = [TextTree(name=n, path="{stdlib}/" + n, pattern="**/*.py") for n in ("json", "email")]


def documents_in(output: Path, side: str, source: str) -> list[str]:
    if not (output / side / source).exists():  # a small source may have no document on a side
        return []
    stream, tokenizer = TokenStream(output / side / source), Tokenizer(output / "tokenizer")
    texts, base = [], 0
    for shard in range(stream.num_shards):
        ends = stream.documents(shard)
        texts += [tokenizer.decode(stream.read(base + int(a), int(b - a))) for a, b in pairwise(ends)]
        base += int(ends[-1])
    return texts


def texts_of(source: TextTree) -> list[str]:
    config = CorpusConfig(output="unused", sources=(source,))
    (unit,) = cut_into_units(config, [list_files(source)])
    return [record.text for record in read_unit(source, unit, 10**6) if isinstance(record, Document)]


def with_rooms() -> dict[str, str]:
    """An environment in which a script elsewhere finds the rooms."""
    return {**os.environ, "PYTHONPATH": str(Path(pipeline.__file__).parents[1])}


def write_lines(path: Path, texts: list[str]) -> dict[str, Any]:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"kind": "jsonl", "name": "lines", "path": str(path)}


def test_every_document_is_on_one_side_once(corpus: PrepSummary) -> None:
    for source in JSON_AND_EMAIL:
        texts = texts_of(source)
        train, heldout = (documents_in(corpus.output, side, source.name) for side in ("train", "heldout"))
        assert sorted(train + heldout) == sorted(set(texts))
        if source.name == "email":  # many enough that the shuffle moves some
            assert train != [text for text in texts if text in set(train)]
    for dataset in corpus.datasets:
        verify(corpus.output / dataset.side / dataset.source)


def test_counts_agree_with_the_files(corpus: PrepSummary) -> None:
    token_bytes = np.load(corpus.output / "tokenizer" / "token_bytes.npy")
    for row in corpus.datasets:
        stream = TokenStream(corpus.output / row.side / row.source)
        assert stream.manifest is not None
        assert (stream.num_tokens, stream.num_shards) == (row.tokens, row.shards)
        assert (stream.manifest.text_bytes, stream.manifest.documents) == (row.text_bytes, row.documents)
        assert (stream.vocab_size, stream.manifest.tokenizer_sha256) == (corpus.vocab_size, corpus.tokenizer_sha256)
        assert int(token_bytes[stream.read(0, stream.num_tokens)].sum()) == row.text_bytes
        np.testing.assert_array_equal(stream.token_bytes(), token_bytes)
        whole_shards = [shard.tokens for shard in stream.manifest.shards if shard.documents > 1]
        assert all(tokens <= 20_000 for tokens in whole_shards)
    assert corpus.total("train", "documents") > corpus.total("heldout", "documents") > 0


def test_two_workers_make_the_same_files_as_one(corpus: PrepSummary, tmp_path: Path, make_config: MakeConfig) -> None:
    again = prepare(make_config(tmp_path / "out", workers=2))
    assert again is not None and tree_hashes(again.output) == tree_hashes(corpus.output)


def test_seeds_change_the_split(corpus: PrepSummary, tmp_path: Path, make_config: MakeConfig) -> None:
    other = prepare(make_config(tmp_path / "out", seed=1))
    assert other is not None
    sides = [set(documents_in(output, "train", "email")) for output in (corpus.output, other.output)]
    assert sides[0] != sides[1]


def test_a_second_run_says_so_and_writes_nothing(corpus: PrepSummary, make_config: MakeConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus.output.rglob("*")}
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    again = prepare(make_config(corpus.output, workers=2), console)
    assert again is not None and again.already_prepared and not corpus.already_prepared
    assert again.datasets == corpus.datasets
    assert "already prepared" in (text := console.export_text()) and "email" in text
    assert before == {path: path.stat().st_mtime_ns for path in corpus.output.rglob("*")}


def test_another_configuration_or_changed_sources_are_refused(tmp_path: Path, make_config: MakeConfig) -> None:
    texts = [f"document {n}: " + "spam and eggs " * 40 for n in range(60)]
    source, output = write_lines(tmp_path / "x.jsonl", texts), tmp_path / "out"
    tokenizer = {"kind": "train_sentencepiece", "vocab_size": 290}
    config = make_config(output, sources=[source], tokenizer=tokenizer)
    prepare(config)
    before = tree_hashes(output)
    changed = make_config(output, sources=[{**source, "weight": 2}], tokenizer=tokenizer, seed=5)
    with pytest.raises(UserError, match=r"(?s)seed: 0 there, 5 here.*sources\.lines\.weight: 1\.0 there, 2\.0 here"):
        prepare(changed)
    write_lines(tmp_path / "x.jsonl", texts[1:])
    with pytest.raises(UserError, match=r"source files: '[0-9a-f]+' there"):
        prepare(config)
    assert tree_hashes(output) == before
    redone = prepare(changed, redo=True)
    assert redone is not None and not redone.already_prepared and redone.total("train", "documents") < 60
    write_lines(tmp_path / "x.jsonl", texts)
    os.utime(tmp_path / "x.jsonl", ns=(0, 0))
    assert prepare(config, redo=True) is not None
    after = tree_hashes(output)
    assert {k: v for k, v in after.items() if k != "summary.json"} == {
        k: v for k, v in before.items() if k != "summary.json"
    }
    victim = output / "train" / "lines" / "shard-00000.bin"
    victim.write_bytes(victim.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"shard-00000\.bin"):
        prepare(config)


def test_a_finished_stage_is_not_remade_unasked(tmp_path: Path, make_config: MakeConfig) -> None:
    texts = [f"document {n}: " + "spam and eggs " * 40 for n in range(60)]
    lines = write_lines(tmp_path / "x.jsonl", texts)
    good = {"kind": "train_sentencepiece", "vocab_size": 290}

    def config(vocab_size: int = 290, seed: int = 0, shard_tokens: int = 20_000) -> CorpusConfig:
        tokenizer = {**good, "vocab_size": vocab_size}
        changes = {"seed": seed, "shard_tokens": shard_tokens}
        return make_config(tmp_path / "out", sources=[lines], tokenizer=tokenizer, **changes)

    with pytest.raises(UserError, match="does not fit"):
        prepare(config(vocab_size=5000))
    assert prepare(config(), until="tokenizer") is None, "a stage that failed is mended without a word"
    with pytest.raises(UserError, match=r"(?s)clean was made from something else.*clean\.seed: 0 there, 1 here"):
        prepare(config(seed=1))
    with pytest.raises(UserError, match=r"tokenizer\.tokenizer\.vocab_size: 290 there, 300 here"):
        prepare(config(vocab_size=300))
    stamps = {stage: (tmp_path / "out/work" / stage / "stage.json").stat().st_mtime_ns for stage in ("clean", "dedup")}
    prepare(config(vocab_size=300), until="tokenizer", redo=True)
    assert stamps == {s: (tmp_path / "out/work" / s / "stage.json").stat().st_mtime_ns for s in stamps}
    summary = prepare(config(vocab_size=300))
    assert summary is not None and summary.vocab_size == 300


def test_duplicates_and_rejects_are_counted_and_kept(tmp_path: Path, make_config: MakeConfig) -> None:
    texts = [f"document {n}: " + "spam and eggs " * 40 for n in range(50)]
    path = tmp_path / "x.jsonl"
    first = write_lines(path, texts + texts[:7])
    path.write_text(path.read_text() + "not json\n" + '{"text": ""}\n')
    second = {**write_lines(tmp_path / "y.jsonl", [texts[3], "a text of its own"]), "name": "second"}
    tokenizer = {"kind": "train_sentencepiece", "vocab_size": 290}
    summary = prepare(make_config(tmp_path / "out", sources=[first, second], tokenizer=tokenizer, seed=3))
    assert [(row.duplicates, row.rejects) for row in summary.sources] == [(7, 2), (1, 0)]
    assert summary is not None
    sides = [documents_in(summary.output, side, "lines") for side in ("train", "heldout")]
    assert sorted(sides[0] + sides[1]) == sorted(texts)
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects/read.jsonl").read_text().splitlines()]
    assert [reject["origin"] for reject in rejects] == [f"{path}:58", f"{path}:59"]
    assert all(reject["source"] == "lines" and reject["reason"] for reject in rejects)
    doubles = [json.loads(line) for line in (tmp_path / "out/rejects/dedup.jsonl").read_text().splitlines()]
    assert [d["reason"] for d in doubles[:7]] == [f"like {path}:{n}" for n in range(1, 8)]
    assert (doubles[7]["source"], doubles[7]["reason"]) == ("second", f"like {path}:4")


def test_what_cannot_work_is_refused_before_any_work(tmp_path: Path, make_config: MakeConfig) -> None:
    lines, output = write_lines(tmp_path / "x.jsonl", ["only one document " * 100]), tmp_path / "deep" / "out"
    for message, config in {
        "no file matches": make_config(output, sources=[{**lines, "path": "nowhere.jsonl"}]),
        "no such file": make_config(output, tokenizer={"kind": "sentencepiece_file", "path": "nowhere.model"}),
        "lies in the output": make_config(tmp_path, sources=[lines]),
    }.items():
        with pytest.raises(UserError, match=message):
            prepare(config)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["x.jsonl"], "nothing is left behind"
    with pytest.raises(UserError, match="two sources are named 'lines'"):
        make_config(output, sources=[lines, lines])


def test_nothing_to_train_on_or_to_measure_on_is_refused(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.txt").write_bytes(b"\xff")
    unreadable = {"kind": "text_tree", "name": "bad", "path": str(tmp_path / "bad")}
    lines = write_lines(tmp_path / "x.jsonl", ["only one document " * 100])
    with pytest.raises(UserError, match=r"no document to train on \(0 of 1 records") as met:
        prepare(make_config(tmp_path / "1", sources=[unreadable]))
    assert "not UTF-8" in met.value.remedy
    with pytest.raises(UserError, match="no held-out document"):
        prepare(make_config(tmp_path / "2", sources=[lines], heldout_fraction=1e-9))
    with pytest.raises(UserError, match="does not fit"):
        prepare(make_config(tmp_path / "3", sources=[lines], heldout_fraction=0))


def test_a_folder_of_the_users_is_never_cleared(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"holds other files: thesis.tex"):
        prepare(make_config(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.tex", "train"]
    with pytest.raises(UserError, match="a folder that can be written"):
        prepare(make_config(tmp_path / "thesis.tex"))


def test_one_writer_at_a_time(tmp_path: Path, make_config: MakeConfig) -> None:
    with only_writer(tmp_path), pytest.raises(UserError, match="being written by another process"):
        prepare(make_config(tmp_path))


def test_a_source_that_changes_meanwhile_is_noticed(tmp_path: Path, make_config: MakeConfig) -> None:
    texts = [f"document {n}: " + "spam and eggs " * 40 for n in range(60)]
    path, stamp = tmp_path / "x.jsonl", (10**18, 10**18)
    tokenizer = {"kind": "train_sentencepiece", "vocab_size": 290}
    config = make_config(tmp_path / "out", sources=[write_lines(path, texts)], tokenizer=tokenizer, workers=2)
    os.utime(path, ns=stamp)
    prepare(config, until="tokenizer")
    write_lines(path, [*texts[:30], texts[30].replace("spam", "bacn", 1), *texts[31:]])
    os.utime(path, ns=stamp)  # neither size nor time tell
    with pytest.raises(UserError, match="changed while it was read"):
        prepare(config)


KILLED = """
import os, signal, sys, time
from data_prep.workers import make_workers
def calls():
    return [(time.sleep, (0.01,)) for _ in range(8)]
if __name__ == "__main__":
    with make_workers(2, mpi=False) as workers:
        for number, _ in workers.run(calls()):
            if number == 4:
                os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "run.py")]
    # The workers hold the pipe of standard error: it ends, and `run` returns, when the last of them has gone.
    done = subprocess.run(command, stderr=subprocess.PIPE, env=with_rooms(), check=False, timeout=30)
    assert done.returncode == -signal.SIGKILL


def test_the_tokenizer_never_sees_held_out_text(tmp_path: Path, make_config: MakeConfig) -> None:
    config = make_config(tmp_path / "out", heldout_fraction=0.5)
    prepare(config, until="tokenizer")
    sample = "".join(path.read_text() for path in sorted((tmp_path / "out/work/tokenizer").glob("*.sample.txt")))
    summary = prepare(config)
    assert summary is not None and summary.total("heldout", "documents") > 5
    for source in ("json", "email"):
        for text in documents_in(summary.output, tokenizing.HELDOUT, source):
            own = [line for line in text.split("\n") if len(line) > 60]
            assert not own or sum(line in sample for line in own) / len(own) < 0.5


def test_the_tokenizers_sample_follows_the_weights(tmp_path: Path, make_config: MakeConfig) -> None:
    """Not the sources' sizes: json is a sixth of email."""
    tree = make_config(tmp_path / "out").model_dump(mode="json")
    sources = [{**source, "weight": weight} for source, weight in zip(tree["sources"], (3, 1))]
    tokenizer = {"kind": "train_sentencepiece", "vocab_size": 400, "sample_bytes": 40_000}
    prepare(make_config(tmp_path / "out", sources=sources, tokenizer=tokenizer, unit_bytes=10**9), until="tokenizer")
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out/work/tokenizer").glob("*.sample.txt"))]
    # About 64 blocks are drawn: the share of one source strays by some 0.06.
    assert len(sizes) == 2 and 0.5 < sizes[0] / sum(sizes) < 0.95
    assert 20_000 < sum(sizes) < 60_000


def test_the_data_section_is_ready_to_train_on(corpus: PrepSummary) -> None:
    data = DataConfig.check(yaml.safe_load((corpus.output / "data.yaml").read_text())["data"], "data.yaml")
    assert [source.name for source in data.sources] == ["json", "email"]
    assert all(TokenStream(path).num_tokens for path in (*(s.path for s in data.sources), *data.heldout))
