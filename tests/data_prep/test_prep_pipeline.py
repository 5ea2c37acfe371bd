"""The whole preparation: nothing lost, nothing half-made, the same files however it is run."""

from __future__ import annotations

import hashlib
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
from rich.console import Console

from configs.corpus import CorpusConfig, TextTree
from configs.errors import UserError
from data_prep import pipeline
from data_prep.format import TokenStream, verify
from data_prep.pipeline import prepare
from data_prep.readers import Document, read_documents
from data_prep.storage import only_writer
from data_prep.summary import PrepSummary
from data_prep.tokenizer import Tokenizer, make_tokenizer

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


def hashes(output: Path) -> dict[str, str]:
    files = sorted(path for path in output.rglob("*") if path.is_file() and path.name != "corpus.yaml")
    return {str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def with_rooms() -> dict[str, str]:
    """An environment in which a script elsewhere finds the rooms."""
    return {**os.environ, "PYTHONPATH": str(Path(pipeline.__file__).parents[1])}


def write_lines(path: Path, texts: list[str]) -> dict[str, Any]:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"kind": "jsonl", "name": "lines", "path": str(path)}


def test_every_document_is_on_one_side_once(corpus: PrepSummary) -> None:
    for source in JSON_AND_EMAIL:
        texts = [record.text for record in read_documents(source) if isinstance(record, Document)]
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
    assert hashes(again.output) == hashes(corpus.output)


def test_seeds_change_the_split(corpus: PrepSummary, tmp_path: Path, make_config: MakeConfig) -> None:
    other = prepare(make_config(tmp_path / "out", seed=1))
    sides = [set(documents_in(output, "train", "email")) for output in (corpus.output, other.output)]
    assert sides[0] != sides[1]


def test_a_second_run_says_so_and_writes_nothing(corpus: PrepSummary, make_config: MakeConfig) -> None:
    before = {path: path.stat().st_mtime_ns for path in corpus.output.rglob("*")}
    console = Console(record=True, width=100, file=open(os.devnull, "w"))  # noqa: SIM115
    again = prepare(make_config(corpus.output, workers=2), console)
    assert again.already_prepared and again.datasets == corpus.datasets and not corpus.already_prepared
    assert "already prepared" in (text := console.export_text()) and "email" in text
    assert before == {path: path.stat().st_mtime_ns for path in corpus.output.rglob("*")}


def test_another_configuration_or_changed_sources_are_refused(tmp_path: Path, make_config: MakeConfig) -> None:
    texts = [f"document {n}: " + "spam and eggs " * 40 for n in range(60)]
    source, output = write_lines(tmp_path / "x.jsonl", texts), tmp_path / "out"
    tokenizer = {"kind": "train_sentencepiece", "vocab_size": 290}
    config = make_config(output, sources=[source], tokenizer=tokenizer)
    prepare(config)
    before = hashes(output)
    with pytest.raises(UserError, match=r"(?s)configuration .*remedy: +choose another output=PATH, or delete"):
        prepare(make_config(output, sources=[source], tokenizer=tokenizer, seed=5))
    write_lines(tmp_path / "x.jsonl", texts[1:])
    with pytest.raises(UserError, match="changed since"):
        prepare(config)
    assert hashes(output) == before
    write_lines(tmp_path / "x.jsonl", texts)
    os.utime(tmp_path / "x.jsonl", ns=(0, 0))
    (output / "summary.json").unlink()  # as if interrupted before the end
    assert not prepare(config).already_prepared
    after = hashes(output)
    assert {k: v for k, v in after.items() if k != "summary.json"} == {
        k: v for k, v in before.items() if k != "summary.json"
    }
    victim = output / "train" / "lines" / "shard-00000.bin"
    victim.write_bytes(victim.read_bytes()[:-2])
    with pytest.raises(UserError, match=r"shard-00000\.bin"):
        prepare(config)


def test_duplicates_and_rejects_are_counted_and_kept(tmp_path: Path, make_config: MakeConfig) -> None:
    texts = [f"document {n}: " + "spam and eggs " * 40 for n in range(50)]
    path = tmp_path / "x.jsonl"
    first = write_lines(path, texts + texts[:7])
    path.write_text(path.read_text() + "not json\n" + '{"text": ""}\n')
    second = {**write_lines(tmp_path / "y.jsonl", [texts[3], "a text of its own"]), "name": "second"}
    tokenizer = {"kind": "train_sentencepiece", "vocab_size": 290}
    summary = prepare(make_config(tmp_path / "out", sources=[first, second], tokenizer=tokenizer, seed=3))
    assert [(row.duplicates, row.rejects) for row in summary.sources] == [(7, 2), (1, 0)]
    sides = [documents_in(summary.output, side, "lines") for side in ("train", "heldout")]
    assert sorted(sides[0] + sides[1]) == sorted(texts)
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [reject["origin"] for reject in rejects] == [f"{path}:58", f"{path}:59"]
    assert all(reject["source"] == "lines" and reject["reason"] for reject in rejects)


def failing(tmp_path: Path, make_config: MakeConfig) -> dict[str, CorpusConfig]:
    """Configurations that must be refused, by a word of the message."""
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.txt").write_bytes(b"\xff")
    unreadable = {"kind": "text_tree", "name": "bad", "path": str(tmp_path / "bad")}
    lines = write_lines(tmp_path / "x.jsonl", ["only one document " * 100])
    output = tmp_path / "deep" / "out"
    return {
        "no document to train on": make_config(output, sources=[unreadable]),
        "no held-out document": make_config(output, sources=[lines], heldout_fraction=1e-9),
        "does not fit": make_config(output, sources=[lines], heldout_fraction=0),
        "no file matches": make_config(output, sources=[{**lines, "path": "nowhere.jsonl"}]),
        "two sources are named": make_config(output, sources=[lines, lines]),
        "no such file": make_config(output, tokenizer={"kind": "sentencepiece_file", "path": "nowhere.model"}),
        "lies in the output": make_config(tmp_path, sources=[lines]),
    }


def test_refusals_leave_nothing_behind(tmp_path: Path, make_config: MakeConfig) -> None:
    for message, config in failing(tmp_path, make_config).items():
        with pytest.raises(UserError, match=message):
            prepare(config)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["bad", "x.jsonl"]


def test_a_folder_of_the_users_is_never_cleared(tmp_path: Path, make_config: MakeConfig) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match=r"holds other files: thesis.tex"):
        prepare(make_config(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["thesis.tex", "train"]
    with pytest.raises(UserError, match="a folder that can be written"):
        prepare(make_config(tmp_path / "thesis.tex"))


def test_what_an_interrupted_run_left_is_cleared(corpus: PrepSummary, tmp_path: Path, make_config: MakeConfig) -> None:
    for left in (".partial/spool/x", "train/email/shard-00000.bin", "tokenizer/tokenizer.model"):
        (tmp_path / "out" / left).parent.mkdir(parents=True)
        (tmp_path / "out" / left).write_text("half")
    assert hashes(prepare(make_config(tmp_path / "out")).output) == hashes(corpus.output)


def test_one_writer_at_a_time(tmp_path: Path, make_config: MakeConfig) -> None:
    with only_writer(tmp_path), pytest.raises(UserError, match="being written by another process"):
        prepare(make_config(tmp_path))


def test_a_source_that_changes_meanwhile_is_noticed(
    tmp_path: Path, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"document {n}: " + "spam and eggs " * 40 for n in range(60)]
    source = write_lines(tmp_path / "x.jsonl", texts)

    def change_then_train(*args: Any) -> Tokenizer:
        write_lines(tmp_path / "x.jsonl", [*texts[:30], "new", *texts[31:]])
        return make_tokenizer(*args)

    monkeypatch.setattr(pipeline, "make_tokenizer", change_then_train)
    tokenizer = {"kind": "train_sentencepiece", "vocab_size": 290}
    with pytest.raises(UserError, match="changed while it was read"):
        prepare(make_config(tmp_path / "out", sources=[source], tokenizer=tokenizer, workers=2))
    assert not (tmp_path / "out").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from data_prep.encode import encode_batches
def batches():
    for _ in range(8):
        yield ["some text"]
    os.kill(os.getpid(), signal.SIGKILL)
if __name__ == "__main__":
    list(encode_batches(Path(sys.argv[1]), batches(), workers=2))
"""


def test_workers_end_with_a_killed_parent(corpus: PrepSummary, tmp_path: Path) -> None:
    (tmp_path / "run.py").write_text(KILLED)
    command = [sys.executable, str(tmp_path / "run.py"), str(corpus.output / "tokenizer")]
    # The workers hold the pipe of standard error: it ends, and `run` returns, when the last of them has gone.
    done = subprocess.run(command, stderr=subprocess.PIPE, env=with_rooms(), check=False, timeout=30)
    assert done.returncode == -signal.SIGKILL


FULL_DISK = """
import resource, sys
from configs.corpus import CorpusConfig
from configs.errors import UserError
from data_prep.pipeline import prepare
if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), int(sys.argv[2])))
    try:
        prepare(CorpusConfig.load(sys.argv[1]))
    except UserError as error:
        sys.exit(f"refused {error}")
"""


@pytest.mark.parametrize("limit_bytes", [100, 12_000, 60_000])  # hit by the rejects or the model, a spool, ...
def test_a_full_disk_is_told_and_cleaned_up(tmp_path: Path, make_config: MakeConfig, limit_bytes: int) -> None:
    (tmp_path / "config.yaml").write_text(make_config(tmp_path / "out").dump())
    (tmp_path / "run.py").write_text(FULL_DISK)
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "config.yaml"), str(limit_bytes)]
    done = subprocess.run(command, capture_output=True, text=True, env=with_rooms(), check=False)
    assert done.returncode == 1 and "refused found:" in done.stderr and "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
