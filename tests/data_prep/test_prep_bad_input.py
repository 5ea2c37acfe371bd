"""Bad input to `glam prep`: one clear message, nothing of the user's touched, everything that is sound kept."""

from __future__ import annotations

import gzip
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml
import zstandard

from configs.corpus import CorpusConfig
from configs.errors import UserError
from data_prep.format import TokenStream
from data_prep.output import PARTS
from data_prep.pipeline import STAGES, prepare
from data_prep.summary import PrepSummary
from data_prep.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
MakeConfig = Callable[..., CorpusConfig]
Source = dict[str, Any]


# ---- small corpora -----------------------------------------------------------------------------------------------
def texts(number: int, words: int = 40, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [f"text {n}: " + " ".join(draw.choices(WORDS, k=words)) for n in range(number)]


WORDS = ("a", "corpus", "of", "words", "drawn", "by", "chance", "that", "say", "little", "yet", "each", "is", "new")


def as_lines(lines: Sequence[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in lines).encode()


def write(path: Path, data: bytes, kind: str = "jsonl") -> Source:
    path.write_bytes(data)
    return {"kind": kind, "name": "bad", "path": str(path)}


@pytest.fixture
def tiny(tmp_path: Path, make_config: MakeConfig) -> MakeConfig:
    """A configuration over forty short lines, other sources behind them, any key replaced."""
    good = {**write(tmp_path / "good.jsonl", as_lines(texts(40))), "name": "good"}

    def make(*sources: Source, **changes: Any) -> CorpusConfig:
        tokenizer = {"kind": "train_sentencepiece", "vocab_size": 300, "sample_bytes": 300_000}
        tree = {"sources": [good, *sources], "tokenizer": tokenizer, **changes}
        return make_config(Path(tree.pop("output", tmp_path / "out")), **tree)

    return make


def prepared(config: CorpusConfig, **options: Any) -> PrepSummary:
    summary = prepare(config, **options)
    assert summary is not None
    return summary


def kept_texts(output: Path, source: str) -> list[str]:
    """The documents of both sides, decoded."""
    tokenizer, found = Tokenizer(output / "tokenizer"), []
    for folder in (output / side / source for side in ("train", "heldout")):
        if not folder.exists():  # a small source may have nothing on a side
            continue
        stream, base = TokenStream(folder), 0
        for shard in range(stream.num_shards):
            ends = stream.documents(shard)
            found += [tokenizer.decode(stream.read(base + int(a), int(b - a))) for a, b in pairwise(ends)]
            base += int(ends[-1])
    return found


def rejects(output: Path, stage: str = "read") -> list[tuple[str, str]]:
    lines = (output / "rejects" / f"{stage}.jsonl").read_bytes().splitlines()
    return [(found["origin"], found["reason"]) for found in map(json.loads, lines)]


def hashes(folder: Path, without: str = "") -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != without)
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def names_below(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


# ---- the real command line ---------------------------------------------------------------------------------------
def limit_files(file_bytes: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))


def glam_prep(config: CorpusConfig, folder: Path, *arguments: str, file_bytes: int | None = None) -> Any:
    """`glam prep` as a user starts it."""
    (folder / "corpus.yaml").write_text(config.dump(), encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-m", "pretrain.cli", "prep", str(folder / "corpus.yaml"), *arguments],
        cwd=ROOT, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}, stdin=subprocess.DEVNULL, check=False,
        preexec_fn=limit_files(file_bytes) if file_bytes is not None else None,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def message(done: Any) -> str:
    """The one message of a refused command, its form checked."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    for part in ("found:", "expected:", "remedy:"):
        assert done.stderr.count(part) == 1, done.stderr
    return str(done.stderr).partition("found:")[2]


# ---- sources -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("kind", "path", "told"),
    [
        ("jsonl", "empty.jsonl", "source 'bad': no document to train on"),
        ("jsonl", "blank.jsonl", "source 'bad': no document to train on"),
        ("text_tree", "empty", "source 'bad': no file matches"),
        ("jsonl", "empty", "source 'bad': no file matches"),
        ("jsonl", "*.nothing", "source 'bad': no file matches"),
        ("text_tree", "nowhere", "source 'bad': no folder"),
        ("parquet", "rowless.parquet", "source 'bad': no document to train on"),
    ],
)
def test_a_source_without_text_is_named(tmp_path: Path, tiny: MakeConfig, kind: str, path: str, told: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "blank.jsonl").write_bytes(b"\n \n\r\n")
    none = pyarrow.table({"text": pyarrow.array([], pyarrow.string())})
    pyarrow.parquet.write_table(none, tmp_path / "rowless.parquet")
    with pytest.raises(UserError) as error:
        prepare(tiny({"kind": kind, "name": "bad", "path": str(tmp_path / path)}))
    assert told in str(error.value) and error.value.remedy
    assert not (tmp_path / "out" / "summary.json").exists()


def packed_source(path: Path, lines: list[str], kept: float) -> Source:
    pack = gzip.compress if path.suffix == ".gz" else zstandard.ZstdCompressor().compress
    data = pack(as_lines(lines))
    return write(path, data[: int(kept * len(data))])


@pytest.mark.parametrize("ending", [".gz", ".zst"])
def test_a_truncated_archive_gives_what_comes_before_the_cut(tmp_path: Path, tiny: MakeConfig, ending: str) -> None:
    lines = [f"{n} {random.Random(n).randbytes(400).hex()}" for n in range(400)]
    path = tmp_path / f"bad.jsonl{ending}"
    summary = prepared(tiny(packed_source(path, lines, kept=0.7)))
    found = kept_texts(summary.output, "bad")
    assert sorted(found) == sorted(lines[: len(found)]) and len(found) > 100
    ((origin, reason),) = rejects(summary.output)
    assert origin == f"{path}:{len(found) + 1}" and "cannot be read further" in reason
    assert summary.sources[1].rejects == 1


def test_a_truncated_table_is_a_reject(tmp_path: Path, tiny: MakeConfig) -> None:
    table = pyarrow.table({"text": texts(50, seed=1)})
    for name in ("a", "b"):
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    write(tmp_path / "a.parquet", whole[:-100])
    summary = prepared(tiny({"kind": "parquet", "name": "bad", "path": str(tmp_path / "*.parquet")}))
    assert sorted(kept_texts(summary.output, "bad")) == sorted(texts(50, seed=1))
    ((origin, reason),) = rejects(summary.output)
    assert origin == f"{tmp_path / 'a.parquet'}:1" and "cannot be read further" in reason


def test_text_that_is_no_utf8_is_a_reject(tmp_path: Path, tiny: MakeConfig) -> None:
    (tmp_path / "tree").mkdir()
    for n, text in enumerate(texts(20, seed=1)):
        (tmp_path / "tree" / f"{n:02d}.txt").write_text(text)
    (tmp_path / "tree" / "05.txt").write_bytes("Grüße".encode("latin-1"))
    tree = {"kind": "text_tree", "name": "tree", "path": str(tmp_path / "tree")}
    lines = as_lines(texts(20, seed=2)).splitlines(keepends=True)
    bad = write(tmp_path / "bad.jsonl", b"".join([*lines[:7], b'{"text": "Gr\xfc\xdfe"}\n', *lines[7:]]))
    summary = prepared(tiny(tree, bad))
    expected = [text for n, text in enumerate(texts(20, seed=1)) if n != 5]
    assert sorted(kept_texts(summary.output, "tree")) == sorted(expected)
    assert sorted(kept_texts(summary.output, "bad")) == sorted(texts(20, seed=2))
    told = dict(rejects(summary.output))
    assert list(told) == [f"{tmp_path / 'tree' / '05.txt'}", f"{tmp_path / 'bad.jsonl'}:8"]
    assert "not UTF-8" in told[str(tmp_path / "tree" / "05.txt")]


def test_a_missing_field_is_a_reject_that_names_it(tmp_path: Path, tiny: MakeConfig) -> None:
    lines = as_lines(texts(20, seed=1)).splitlines(keepends=True)
    bad = write(tmp_path / "bad.jsonl", b"".join([b'{"body": "x"}\n', *lines, b'{"text": null}\n']))
    summary = prepared(tiny(bad))
    assert sorted(kept_texts(summary.output, "bad")) == sorted(texts(20, seed=1))
    assert rejects(summary.output) == [
        (f"{bad['path']}:1", "field 'text' is missing, not text"),
        (f"{bad['path']}:22", "field 'text' is NoneType, not text"),
    ]
    with pytest.raises(UserError, match=r"(?s)source 'bad': no document to train on.*'no_such' is missing"):
        prepare(tiny({**bad, "text_field": "no_such"}), redo=True)


MEASURED = """
import sys
from configs.corpus import CorpusConfig
from data_prep.pipeline import prepare
if __name__ == "__main__":
    prepare(CorpusConfig.load(sys.argv[1]))
    print([line for line in open("/proc/self/status") if line.startswith("VmHWM")][0].split()[1])
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is told by /proc")
@pytest.mark.parametrize("letter", ["x", "😀"])
def test_a_giant_line_is_a_reject_read_in_bounded_memory(tmp_path: Path, tiny: MakeConfig, letter: str) -> None:
    path, neighbours = tmp_path / "bad.jsonl", texts(40, seed=1)
    with path.open("wb") as file:
        file.write(as_lines(neighbours[:20]) + f'{{"text": "{letter}'.encode())
        for _ in range(100):
            file.write(b"y" * 1_000_000)
        file.write(b'"}\n' + as_lines(neighbours[20:]))
    config = tiny({"kind": "jsonl", "name": "bad", "path": str(path)}, deduplicate={"exact": True, "near": None})
    (tmp_path / "config.yaml").write_text(config.dump(), encoding="utf-8")
    (tmp_path / "run.py").write_text(MEASURED)
    command = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "config.yaml")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    path.unlink()
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 600 * 1024
    assert sorted(kept_texts(tmp_path / "out", "bad")) == sorted(neighbours)
    ((origin, reason),) = rejects(tmp_path / "out")
    assert origin == f"{path}:21" and "100,000,0" in reason and "max_document_bytes" in reason


# ---- too many rejects --------------------------------------------------------------------------------------------
def test_more_rejects_than_allowed_end_it_behind_the_first_stage(tmp_path: Path, tiny: MakeConfig) -> None:
    bad = write(tmp_path / "bad.jsonl", as_lines(texts(16, seed=1)) + b"{\n" * 4)
    done = glam_prep(tiny(bad, max_reject_fraction=0.1), tmp_path)
    told = message(done)
    assert all(part in told for part in ("source 'bad': 4 of 20 records", "10.00% (max_reject_fraction)", "malformed"))
    assert [name for name in STAGES if (tmp_path / "out" / "work" / name).exists()] == ["read"]
    summary = prepared(tiny(bad, max_reject_fraction=0.2))
    assert summary.sources[1].rejects == 4, "what was read counts when more is allowed"


def test_refused_rejects_are_those_of_the_source_named(tmp_path: Path, tiny: MakeConfig) -> None:
    other = {**write(tmp_path / "other.jsonl", as_lines(texts(40, seed=2)) + b"[]\n"), "name": "other"}
    bad = write(tmp_path / "bad.jsonl", as_lines(texts(16, seed=1)) + b"{\n" * 4)
    with pytest.raises(UserError, match="source 'bad': 4 of 20") as error:
        prepare(tiny(other, bad, max_reject_fraction=0.1))
    assert "malformed" in error.value.found and "a JSON list" not in error.value.found


# ---- an output that is there -------------------------------------------------------------------------------------
def test_another_configuration_is_refused_and_redo_remakes(tmp_path: Path, tiny: MakeConfig) -> None:
    prepare(tiny())
    before = hashes(tmp_path / "out")
    changes: dict[str, Any] = {"seed": 5, "heldout_fraction": 0.3}
    told = message(glam_prep(tiny(**changes), tmp_path))
    assert all(part in told for part in ("seed: 0 there, 5 here", "heldout_fraction: 0.2 there, 0.3 here", "--redo"))
    assert hashes(tmp_path / "out") == before
    remade = hashes(prepared(tiny(**changes), redo=True).output)
    shutil.rmtree(tmp_path / "out")
    assert remade == hashes(prepared(tiny(**changes)).output) != before


def test_changed_sources_are_refused_and_redo_remakes(tmp_path: Path, tiny: MakeConfig) -> None:
    config = tiny()
    prepare(config)
    before = hashes(tmp_path / "out")
    with Path(config.sources[0].path).open("ab") as file:
        file.write(as_lines(["one more text"]))
    with pytest.raises(UserError, match="source files"):
        prepare(config)
    assert hashes(tmp_path / "out") == before
    assert "one more text" in kept_texts(prepared(config, redo=True).output, "good")


@pytest.mark.parametrize(
    ("until", "changes", "told"),
    [
        ("read", {"max_document_bytes": 1000}, "read.max_document_bytes: 16777216 there, 1000 here"),
        ("dedup", {"seed": 5}, "clean.seed: 0 there, 5 here"),
        ("dedup", {"deduplicate": {"exact": False, "near": None}}, "dedup.exact: True there, False here"),
        ("tokenizer", {"heldout_fraction": 0.3}, "tokenizer.heldout_fraction: 0.2 there, 0.3 here"),
    ],
)
def test_a_finished_stage_of_another_configuration_is_refused(
    tmp_path: Path, tiny: MakeConfig, until: str, changes: dict[str, Any], told: str
) -> None:
    assert prepare(tiny(), until=until) is None
    before = hashes(tmp_path / "out")
    with pytest.raises(UserError) as error:
        prepare(tiny(**changes))
    assert told in error.value.found and "--redo" in error.value.remedy
    assert hashes(tmp_path / "out") == before
    remade = hashes(prepared(tiny(**changes), redo=True).output)
    shutil.rmtree(tmp_path / "out")
    assert remade == hashes(prepared(tiny(**changes)).output)


TRAINED = {"kind": "train_classifier", "curated": ["good"], "filter": ["bad"], "features": 256}


@pytest.mark.parametrize(
    "changes",
    [
        {"shard_tokens": 1000},
        {"tokenizer": {"kind": "train_sentencepiece", "vocab_size": 310}},
        {"quality": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
@pytest.mark.parametrize("published", [0, 2])
def test_redo_after_a_stop_in_the_last_step(
    tmp_path: Path, tiny: MakeConfig, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], published: int
) -> None:
    """Some files have left the stages that made them, some are published: neither is missed, nor left behind."""
    bad = write(tmp_path / "bad.jsonl", as_lines(texts(40, seed=3)))

    def stop(output: Path) -> None:
        for part in PARTS[:published]:
            os.replace(output / "work" / "ready" / part, output / part)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("data_prep.pipeline.publish_parts", stop)
        prepare(tiny(bad, quality=TRAINED))
    remade = hashes(prepared(tiny(bad, **{"quality": TRAINED, **changes}), redo=True).output)
    shutil.rmtree(tmp_path / "out")
    assert remade == hashes(prepared(tiny(bad, **{"quality": TRAINED, **changes})).output)


def test_a_folder_of_the_users_is_never_cleared(tmp_path: Path, tiny: MakeConfig) -> None:
    for name in ("thesis.tex", "train/notes.txt", "work/diary.txt"):
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text("years of work")
    before = hashes(tmp_path / "mine")
    for redo in (False, True):
        with pytest.raises(UserError, match=r"holds other files: thesis.tex"):
            prepare(tiny(output=tmp_path / "mine"), redo=redo)
    told = message(glam_prep(tiny(output=tmp_path / "mine"), tmp_path, "--redo"))
    assert "thesis.tex" in told and "output=PATH" in told
    assert hashes(tmp_path / "mine") == before


@pytest.mark.parametrize("names", [["train/notes.txt"], ["quality/a.txt", "rejects/b.txt"], ["work/diary.txt"]])
@pytest.mark.parametrize("redo", [False, True])
def test_names_like_ours_are_not_ours(tmp_path: Path, tiny: MakeConfig, names: list[str], redo: bool) -> None:
    for name in names:
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mine" / name).write_text("years of work")
    before = hashes(tmp_path / "mine")
    with pytest.raises(UserError, match="a new or an empty folder"):
        prepare(tiny(output=tmp_path / "mine"), redo=redo)
    assert hashes(tmp_path / "mine") == before


# ---- the disk ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("file_bytes", [100, 6_000, 20_000])  # hit by the rejects or the counts, the model, tokens
def test_a_full_disk_is_told_and_the_same_command_goes_on(tmp_path: Path, tiny: MakeConfig, file_bytes: int) -> None:
    more = write(tmp_path / "more.jsonl", as_lines(texts(400, seed=1)))
    config = tiny(more)
    undisturbed = hashes(prepared(config).output)
    shutil.rmtree(tmp_path / "out")
    told = message(glam_prep(config, tmp_path, file_bytes=file_bytes))
    assert "File too large" in told and "run the same command again" in told
    assert not list((tmp_path / "out").rglob("*.tmp")), "nothing half-written takes room"
    assert hashes(prepared(config).output) == undisturbed


@contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[str], None]]:
    """A file system of one megabyte; the function given changes its size. Skips where none can be mounted."""
    mount = shutil.which("mount")
    folder.mkdir(exist_ok=True)
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting a small file system needs root")
    try:
        yield lambda size: subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True) and None
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_disk_that_fills_up_and_gets_room_again(tmp_path: Path, tiny: MakeConfig, workers: int) -> None:
    more = write(tmp_path / "more.jsonl", as_lines(texts(3000, words=60, seed=1)))
    output = tmp_path / "disk" / "out"
    config = tiny(more, output=output, workers=workers, unit_bytes=200_000, shard_tokens=200_000)
    undisturbed = hashes(prepared(config).output)
    assert sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) > 2**20
    shutil.rmtree(output)
    with small_disk(tmp_path / "disk") as resize:
        told = message(glam_prep(config, tmp_path))
        assert "No space left" in told and "run the same command again" in told
        assert (output / "work" / "read" / "stage.json").is_file(), "what is done is kept"
        assert not list(output.rglob("*.tmp"))
        resize("64m")
        done = glam_prep(config, tmp_path)
        assert done.returncode == 0, done.stderr
        assert hashes(output) == undisturbed


def test_an_output_that_cannot_be_written(tmp_path: Path, tiny: MakeConfig) -> None:
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for output in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "link", tmp_path / "link" / "below"):
        with pytest.raises(UserError) as error:
            prepare(tiny(output=output))
        assert error.value.expected == "a folder that can be written" and str(output) in error.value.found
    assert names_below(tmp_path) == ["file", "good.jsonl", "link"]


def test_an_output_on_a_read_only_disk(tmp_path: Path, tiny: MakeConfig) -> None:
    with small_disk(tmp_path / "disk"):
        subprocess.run(["mount", "-o", "remount,ro", str(tmp_path / "disk")], check=True)
        with pytest.raises(UserError, match=r"(?s)Read-only file system.*a folder that can be written"):
            prepare(tiny(output=tmp_path / "disk" / "out"))


# ---- the configuration -------------------------------------------------------------------------------------------
def test_a_source_within_the_output_is_refused(tmp_path: Path, tiny: MakeConfig) -> None:
    before = names_below(tmp_path)
    with pytest.raises(UserError, match="lies in the output"):
        prepare(tiny(output=tmp_path))
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match="lies in the output"):
        prepare(tiny(output=tmp_path / "link"))
    assert names_below(tmp_path) == sorted([*before, "link"])


@pytest.mark.parametrize(
    ("quality", "told"),
    [
        ({"kind": "train_classifier", "curated": ["good"], "filter": ["wikipedia"]}, "'wikipedia'; there are good"),
        ({"kind": "train_classifier", "curated": ["good"], "filter": ["good"]}, "'good' is both curated and filtered"),
        ({"kind": "classifier_file", "path": "nowhere.safetensors", "filter": ["good"]}, "nowhere.safetensors"),
    ],
    ids=["unknown source", "both classes", "no file"],
)
def test_quality_of_what_is_not_there_is_refused(
    tmp_path: Path, tiny: MakeConfig, quality: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError) as error:
        prepare(tiny(quality=quality))
    assert told in error.value.found and not (tmp_path / "out").exists()


def test_two_sources_of_one_name_are_refused(tmp_path: Path, tiny: MakeConfig) -> None:
    source = yaml.safe_load(tiny().dump())["sources"][0]
    with pytest.raises(UserError, match="two sources are named 'good'"):
        tiny(source)


def test_an_unknown_loader_is_refused(tmp_path: Path, tiny: MakeConfig) -> None:
    bad = {"kind": "huggingface", "name": "bad", "builder": "squad", "path": str(tmp_path / "good.jsonl")}
    with pytest.raises(UserError, match=r"source 'bad': builder='squad'"):
        prepare(tiny(bad))


# ---- workers -----------------------------------------------------------------------------------------------------
def kill_a_worker(when: Path, killed: list[int]) -> None:
    """Wait for a file, then end one process of the pool, as the kernel does when memory runs out."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if when.exists() and (children := multiprocessing.active_children()):
            killed.append(children[0].pid or 0)
            os.kill(killed[0], signal.SIGKILL)
            return
        time.sleep(0.001)


def test_a_worker_that_is_killed_costs_no_finished_work(tmp_path: Path, tiny: MakeConfig) -> None:
    more = write(tmp_path / "more.jsonl", as_lines(texts(600, seed=1)))
    config = tiny(more, workers=2, unit_bytes=6_000)
    alone = config.model_copy(update={"workers": 1})
    undisturbed = hashes(prepared(alone).output, without="corpus.yaml")
    shutil.rmtree(tmp_path / "out")
    killed: list[int] = []
    stage = tmp_path / "out" / "work" / "read" / "stage.json"
    watch = threading.Thread(target=kill_a_worker, args=(stage, killed), daemon=True)
    watch.start()
    with pytest.raises(UserError, match="a worker process died") as error:
        prepare(config)
    watch.join()
    assert killed and "what is done is kept" in error.value.remedy
    before = stage.stat().st_mtime_ns
    assert prepare(alone, until="clean") is None
    assert stage.stat().st_mtime_ns == before, "the first stage is not done again"
    assert hashes(prepared(config).output, without="corpus.yaml") == undisturbed
