"""What may be removed, and what a kill between two steps leaves: each of these windows was open once."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.corpus import CorpusConfig
from configs.errors import UserError
from data_prep import assemble, output, stages
from data_prep.output import MARK, READY, TRASH, WORK
from data_prep.pipeline import prepare
from data_prep.summary import SUMMARY
from tests.data_prep.mixed import mixed_config, tree_hashes

Make = Callable[..., CorpusConfig]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sources")


@pytest.fixture
def make(sources: Path, tmp_path: Path) -> Make:
    """Configurations that write to the same output."""

    def with_changes(**changes: Any) -> CorpusConfig:
        tree = {"output": tmp_path / "out", "quality": None, **changes}
        return mixed_config(sources, tree.pop("output"), **tree)

    return with_changes


@pytest.fixture(scope="module")
def expected(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    """What an undisturbed run makes, by `shard_tokens`."""
    made = {}
    for tokens in (20_000, 7_000):
        folder = tmp_path_factory.mktemp("whole") / "out"
        prepare(mixed_config(sources, folder, quality=None, shard_tokens=tokens))
        made[tokens] = tree_hashes(folder)
    return made


def all_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "files",
    [["corpus.yaml", "train/mine.txt"], ["summary.json"], ["train/mine.txt", "work/"], ["work/notes.txt"], ["work"]],
)
@pytest.mark.parametrize("redo", [False, True])
def test_nothing_of_the_users_is_removed(make: Make, files: list[str], redo: bool) -> None:
    """Though it bears our names."""
    folder = Path(make().output)
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).mkdir() if name.endswith("/") else (folder / name).write_text("mine")
    before = all_files(folder)
    with pytest.raises(UserError):
        prepare(make(), until="read", redo=redo)
    assert all_files(folder) == before


def test_a_folder_named_work_beside_a_finished_corpus_stays(make: Make) -> None:
    prepare(make())
    folder = Path(make().output)
    (folder / WORK).mkdir()
    (folder / WORK / "notes.txt").write_text("mine")
    assert prepare(make()) is not None
    with pytest.raises(UserError, match="not of our making"):
        prepare(make(seed=1), redo=True)
    assert (folder / WORK / "notes.txt").read_text() == "mine"


def test_what_the_last_removal_left_goes_with_the_next_call(make: Make, expected: dict[int, dict[str, str]]) -> None:
    prepare(make())
    folder = Path(make().output)
    for left in (WORK, TRASH):
        (folder / left / "clean").mkdir(parents=True)
        (folder / left / "clean" / "stage.json").write_text("{}")
    (folder / WORK / MARK).touch()
    assert prepare(make()) is not None
    assert tree_hashes(folder) == expected[20_000]


class Killed(BaseException):
    """As good as a kill: nothing of ours catches it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, call: int = 0) -> None:
    """The process dies before this call of a function."""
    function, calls = getattr(module, name), iter(range(10**6))

    def dying(*arguments: Any, **named: Any) -> Any:
        if next(calls) == call:
            raise Killed
        return function(*arguments, **named)

    monkeypatch.setattr(module, name, dying)


@pytest.mark.parametrize("call", range(6))
def test_killed_while_it_publishes(
    make: Make, monkeypatch: pytest.MonkeyPatch, expected: dict[int, dict[str, str]], call: int
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, output, "remove", call)
        prepare(make())
    prepare(make())
    assert tree_hashes(Path(make().output)) == expected[20_000]


@pytest.mark.parametrize("call", range(4))
@pytest.mark.parametrize("function", ["remove", "remove_stage", "forget_assembled"])
def test_killed_while_it_makes_way_for_another_configuration(
    make: Make, monkeypatch: pytest.MonkeyPatch, expected: dict[int, dict[str, str]], function: str, call: int
) -> None:
    """First stopped before its last step, then killed in a --redo: the next call makes what it says, or refuses."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, output, "_remove_work")  # all is published, and the workspace still there
        prepare(make())
    os.remove(Path(make().output) / SUMMARY)  # as if killed just before the summary came
    changed = make(shard_tokens=7_000)
    from data_prep import pipeline

    places = {"remove": stages, "remove_stage": pipeline, "forget_assembled": pipeline}
    with monkeypatch.context() as patch:
        kill_at(patch, places[function], function, call)
        with contextlib.suppress(Killed):
            prepare(changed, redo=True)
    try:
        prepare(changed)
    except UserError:
        prepare(changed, redo=True)
    assert tree_hashes(Path(changed.output)) == expected[7_000]


def test_a_stage_without_its_first_file_is_a_half(make: Make, expected: dict[int, dict[str, str]]) -> None:
    prepare(make(), until="dedup")
    work = Path(make().output) / WORK
    (work / "clean" / stages.MADE_FROM).unlink()
    for path in (work / "clean").glob("*.fates.npy"):
        path.write_bytes(b"of another configuration")
    prepare(make())
    assert tree_hashes(Path(make().output)) == expected[20_000]


def test_shards_that_stood_ready_and_were_lost_are_made_again(
    make: Make, monkeypatch: pytest.MonkeyPatch, expected: dict[int, dict[str, str]]
) -> None:
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, assemble, "say_assembled")
        prepare(make())
    stages.remove(Path(make().output) / WORK / READY)
    prepare(make())
    assert tree_hashes(Path(make().output)) == expected[20_000]


def test_a_corpus_stays_until_the_new_one_is_made(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(make())
    before = tree_hashes(Path(make().output))
    with pytest.raises(UserError, match="does not fit"):
        prepare(make(tokenizer={"kind": "train_sentencepiece", "vocab_size": 200_000}), redo=True)
    after = {name: found for name, found in tree_hashes(Path(make().output)).items() if not name.startswith(WORK)}
    assert after == before
    assert prepare(make()) is not None and tree_hashes(Path(make().output)) == before


def test_the_tokenizers_file_belongs_to_its_own_stage(make: Make, tmp_path: Path) -> None:
    """Another one remakes nothing before it, and is named when refused."""
    prepare(make(output=tmp_path / "a"))
    prepare(make(output=tmp_path / "b", tokenizer={"kind": "train_sentencepiece", "vocab_size": 420}))
    files = {name: tmp_path / name / "tokenizer" / "tokenizer.model" for name in "ab"}
    own = tmp_path / "own.model"
    own.write_bytes(files["a"].read_bytes())
    config = make(tokenizer={"kind": "sentencepiece_file", "path": str(own)})
    prepare(config, until="tokenizer")
    stamp = (Path(config.output) / WORK / "dedup" / "stage.json").stat().st_mtime_ns
    own.write_bytes(files["b"].read_bytes())
    with pytest.raises(UserError, match=r"tokenizer\.tokenizer file: "):
        prepare(config)
    prepare(config, until="tokenizer", redo=True)
    assert (Path(config.output) / WORK / "dedup" / "stage.json").stat().st_mtime_ns == stamp
    summary = prepare(config)
    assert summary is not None and summary.vocab_size == 420


def test_an_output_below_its_source_is_not_read(tmp_path: Path) -> None:
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(f"document {number} " + "spam and eggs " * 30)
    tree = {
        "output": str(tmp_path / "out"),
        "sources": [{"kind": "text_tree", "name": "t", "path": str(tmp_path), "pattern": "**/*"}],
        "deduplicate": {"near": None},
        "tokenizer": {"kind": "train_sentencepiece", "vocab_size": 290},
        "heldout_fraction": 0.2,
        "workers": 1,
    }
    config = CorpusConfig.check(tree, "test")
    prepare(config, until="clean")
    summary = prepare(config)
    assert summary is not None and summary.sources[0].files == 40
    again = prepare(config)
    assert again is not None and again.already_prepared
