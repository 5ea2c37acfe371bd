"""Units: which files a source has, and that no cut of them can be seen in what is read."""

from __future__ import annotations

import fnmatch
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from configs.corpus import CorpusConfig, HuggingFace, JsonLines, Parquet, SourceSpec, TextTree
from configs.errors import UserError
from data_prep.documents import Job
from data_prep.readers import Document, Record, Reject, read_unit
from data_prep.reading import read_task
from data_prep.units import Unit, cut_into_units, list_files, refine, source_state
from tests.data_prep.test_prep_readers import PACKED, damaged_parquet, incompressible, jsonl

WHOLE = 2**40  # bytes: nothing is cut


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Where sources lie; the work lies beside it."""
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def configuration(sources: list[SourceSpec], unit_bytes: int, max_bytes: int = 2**24) -> CorpusConfig:
    return CorpusConfig(output="unused", sources=tuple(sources), unit_bytes=unit_bytes, max_document_bytes=max_bytes)


def units_as_read(config: CorpusConfig, work: Path) -> list[Unit]:
    """The units every later stage sees: cut by size, counted by the stage `read`, refined."""
    (work / "read").mkdir(parents=True, exist_ok=True)
    units = cut_into_units(config, [list_files(source) for source in config.sources])
    found = [read_task(Job(config, work, unit)) for unit in units]
    return refine(units, [part["records"] for part in found], [part["cuts"] for part in found])


def records(config: CorpusConfig, units: list[Unit]) -> list[tuple[int, Record]]:
    return [
        (unit.source, record)
        for unit in units
        for record in read_unit(config.sources[unit.source], unit, config.max_document_bytes)
    ]


def assert_no_cut_is_seen(
    sources: list[SourceSpec], unit_bytes: int, work: Path, max_bytes: int = 2**24
) -> tuple[list[Unit], list[tuple[int, Record]]]:
    """Read cut and whole, compare; returns the units of the cut, and what was read."""
    cut, whole = (configuration(sources, size, max_bytes) for size in (unit_bytes, WHOLE))
    units = units_as_read(cut, work)
    found = records(cut, units)
    assert found == records(whole, units_as_read(whole, work))
    assert [unit.number for unit in units] == list(range(len(units)))
    places = [(source, record.file, record.record) for source, record in found]
    assert places == sorted(set(places)), "each place once, in order"
    return units, found


# ---- cuts --------------------------------------------------------------------------------------------------------
LINES = st.one_of(
    st.just(b""),
    st.sampled_from([b" ", b"\t\r", b"{", b"\xff", b"\x0b\x0c", b'{"text": ""}', b'{"no": 1}', b"null"]),
    st.binary(max_size=30).map(lambda data: data.replace(b"\n", b"\r")),
    st.text(max_size=40).map(lambda text: json.dumps({"text": text}).encode()),
    st.text("aé→😀\u2028\x85", max_size=40).map(lambda text: json.dumps({"text": text}, ensure_ascii=False).encode()),
    st.integers(0, 400).map(lambda size: b'{"text": "' + b"x" * size + b'"}'),
    st.integers(65_500, 65_800).map(lambda size: b"y" * size),  # around what is too long to be held
)
FILES = st.lists(st.tuples(st.lists(LINES, max_size=12), st.sampled_from([b"\n", b"\r\n"]), st.booleans()), max_size=3)


@pytest.mark.parametrize("ending", PACKED)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=FILES, unit_bytes=st.integers(1, 300))
def test_lines_are_the_same_however_files_are_cut(data: Path, ending: str, files: list[Any], unit_bytes: int) -> None:
    expected = 0
    for old in data.glob("*.jsonl*"):
        old.unlink()
    for number, (lines, line_end, has_last_end) in enumerate(files):
        content = line_end.join(lines) + (line_end if has_last_end else b"")
        expected += len(content.split(b"\n")) - (content.endswith(b"\n") or not content)
        (data / f"{number}.jsonl{ending}").write_bytes(PACKED[ending](content))
    if not files:
        return
    # Some twenty pieces a file, to be done soon.
    unit_bytes = max(unit_bytes, max(path.stat().st_size for path in data.glob("*.jsonl*")) // 20)
    source = JsonLines(name="j", path=str(data))
    _, found = assert_no_cut_is_seen([source], unit_bytes, data.parent / "work", max_bytes=50)
    assert len(found) == expected, "a record for each line, blank ones too"


def test_a_cut_at_every_byte(data: Path) -> None:
    texts = ["a", "", "é→", "😀" * 5, "last"]
    (data / "x.jsonl").write_bytes(b"\n\r\n" + jsonl(texts, ensure_ascii=False) + b"\n{")
    source = JsonLines(name="j", path=str(data))
    for unit_bytes in range(1, (data / "x.jsonl").stat().st_size + 1):
        _, found = assert_no_cut_is_seen([source], unit_bytes, data.parent / "work")
        assert [r.text for _, r in found if isinstance(r, Document)] == [text for text in texts if text]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("kept", [1.0, 0.6], ids=["whole", "truncated"])
def test_archives_are_cut_by_records(data: Path, ending: str, kept: float) -> None:
    texts = incompressible(lines=600, line_bytes=1000)
    packed = PACKED[ending](jsonl(texts))
    (data / f"x.jsonl{ending}").write_bytes(packed[: int(kept * len(packed))])
    source = JsonLines(name="j", path=str(data))
    units, found = assert_no_cut_is_seen([source], 30_000, data.parent / "work")
    read = [record.text for _, record in found if isinstance(record, Document)]
    assert read == texts[: len(read)] and len(read) > 100
    assert len(units) > 3 and all(unit.take for unit in units[:-1]) and units[-1].take is None
    assert [unit.first_record for unit in units[1:]] == [unit.skip for unit in units[1:]]
    for before, after in pairwise(units):
        assert before.skip + (before.take or 0) == after.skip
    assert isinstance(found[-1][1], Reject) == (kept < 1)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.one_of(st.none(), st.text(max_size=200)), max_size=60),
    rows_a_group=st.integers(1, 20),
    unit_bytes=st.integers(1, 3000),
)
def test_rows_are_the_same_however_tables_are_cut(
    data: Path, rows: list[str | None], rows_a_group: int, unit_bytes: int
) -> None:
    table = pyarrow.table({"text": pyarrow.array(rows, pyarrow.string())})
    pyarrow.parquet.write_table(table, data / "x.parquet", row_group_size=rows_a_group)
    source = Parquet(name="p", path=str(data))
    _, found = assert_no_cut_is_seen([source], unit_bytes, data.parent / "work")
    assert [getattr(record, "text", None) for _, record in found] == [row or None for row in rows]


def test_large_row_groups_are_cut_by_records(data: Path) -> None:
    texts = incompressible(lines=1500, line_bytes=100)
    table = pyarrow.table({"text": texts})
    pyarrow.parquet.write_table(table, data / "x.parquet", row_group_size=700, compression="zstd")
    units, found = assert_no_cut_is_seen([Parquet(name="p", path=str(data))], 8_000, data.parent / "work")
    assert [record.text for _, record in found] == texts  # type: ignore[union-attr]
    assert {unit.start for unit in units} == {0, 1, 2} and len(units) > 6


def test_damaged_row_groups_hide_no_cut(data: Path) -> None:
    texts = incompressible(lines=60, line_bytes=100)
    damaged_parquet(data / "x.parquet", texts, rows_a_group=10, group=1)
    for unit_bytes in (1, 900, 2_500):
        for field in ("text", "no such column"):
            source = Parquet(name="p", path=str(data), text_field=field)
            units, found = assert_no_cut_is_seen([source], unit_bytes, data.parent / "work")
            assert len(found) == 60 and len(units) > 1


@pytest.mark.parametrize("unit_bytes", [1, 500, 2_000])
def test_saved_datasets_are_cut_by_rows(data: Path, unit_bytes: int) -> None:
    import datasets

    texts = incompressible(lines=60, line_bytes=100)
    rows = [None if number % 9 == 5 else text for number, text in enumerate(texts)]
    datasets.Dataset.from_dict({"text": rows}).save_to_disk(str(data / "saved"))
    source = HuggingFace(name="h", path=str(data / "saved"), builder="disk")
    units, found = assert_no_cut_is_seen([source], unit_bytes, data.parent / "work")
    assert [getattr(record, "text", None) for _, record in found] == rows and len(units) > 2


def test_small_files_share_a_unit_and_sources_do_not(data: Path) -> None:
    sources: list[SourceSpec] = []
    for name in "ab":
        (data / name).mkdir()
        for number in range(20):
            (data / name / f"{number:02d}.txt").write_text(f"{name}{number}" * (300 if number == 7 else 1))
        sources.append(TextTree(name=name, path=str(data / name)))
    units, found = assert_no_cut_is_seen(sources, 20, data.parent / "work")
    assert len(found) == 40 and {len(unit.files) for unit in units} > {1}
    assert [number for unit in units for number, _ in unit.files] == [*range(20)] * 2
    whole = cut_into_units(configuration(sources, WHOLE), [list_files(source) for source in sources])
    assert [(unit.source, len(unit.files)) for unit in whole] == [(0, 20), (1, 20)]


def test_sizes_of_units_add_up(data: Path) -> None:
    """What progress is shown by."""
    (data / "a.jsonl").write_bytes(jsonl(incompressible(lines=100, line_bytes=100)))
    (data / "b.jsonl").write_bytes(jsonl(["small"]))
    source = JsonLines(name="j", path=str(data))
    held = sum(path.stat().st_size for path in list_files(source))
    for unit_bytes in (1_000, WHOLE):
        units = cut_into_units(configuration([source], unit_bytes), [list_files(source)])
        assert held - len(units) <= sum(unit.bytes for unit in units) <= held


def test_a_file_that_grew_is_read_to_its_end(data: Path) -> None:
    path = data / "x.jsonl"
    path.write_bytes(jsonl(["a"] * 20))
    source = JsonLines(name="j", path=str(path))
    units = cut_into_units(configuration([source], 40), [list_files(source)])
    with path.open("ab") as file:
        file.write(jsonl(["b"] * 3))
    texts = [record.text for unit in units for record in read_unit(source, unit, 100) if isinstance(record, Document)]
    assert texts == ["a"] * 20 + ["b"] * 3 and len(units) > 2


# ---- files -------------------------------------------------------------------------------------------------------
def names(source: SourceSpec, root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in list_files(source)]


def test_patterns_and_excludes_agree_with_path_glob() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    unwanted = ("site-packages/**", "test/**", "**/__pycache__/**")
    for pattern in ("json/*.py", "json/**/*.py", "email/**/[!a-m]*.py", "xml/*/__init__.py", "j?on/*.py"):
        ours = list_files(TextTree(name="t", path="{stdlib}", pattern=pattern, exclude=unwanted))
        assert ours == sorted(path for path in root.glob(pattern) if path.is_file())
    both = list_files(TextTree(name="t", path="{stdlib}/email", pattern="**/*.py"))
    fewer = list_files(TextTree(name="t", path="{stdlib}/email", pattern="**/*.py", exclude=("**/mime/**", "_*.py")))
    kept = [
        p for p in both if "mime" not in p.parts and not (fnmatch.fnmatch(p.name, "_*.py") and p.parent.name == "email")
    ]
    assert fewer == kept and len(kept) < len(both)


def test_a_folder_gives_the_files_of_its_kind_also_from_below(tmp_path: Path) -> None:
    (tmp_path / "in" / "deep.jsonl").mkdir(parents=True)  # a folder, whatever its name
    there = ["a.jsonl", "b.jsonl.gz", "in/c.jsonl.zst", "in/d.ndjson", "e.json.gz", "f.parquet", "g.json", "h.txt"]
    for name in there:
        (tmp_path / name).write_bytes(b"")
    lines = ["a.jsonl", "b.jsonl.gz", "e.json.gz", "in/c.jsonl.zst", "in/d.ndjson"]
    assert names(JsonLines(name="s", path=str(tmp_path)), tmp_path) == lines
    assert names(Parquet(name="s", path=str(tmp_path)), tmp_path) == ["f.parquet"]
    assert names(HuggingFace(name="s", path=str(tmp_path), builder="json"), tmp_path) == sorted(
        there, key=lambda name: Path(name).parts
    )


def test_a_glob_may_cross_folders_and_name_any_file(tmp_path: Path) -> None:
    for name in ("a.jsonl", "x/b.jsonl", "x/y/c.jsonl", "x/d.log", "[1].jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    for pattern, expected in {
        "*.jsonl": ["[1].jsonl", "a.jsonl"],
        "**/*.jsonl": ["[1].jsonl", "a.jsonl", "x/b.jsonl", "x/y/c.jsonl"],
        "x/*": ["x/b.jsonl", "x/d.log"],
        "x/d.log": ["x/d.log"],
        "[1].jsonl": ["[1].jsonl"],  # there is such a file
    }.items():
        assert names(JsonLines(name="s", path=str(tmp_path / pattern)), tmp_path) == expected


def test_the_users_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.jsonl").write_bytes(b"")
    assert list_files(JsonLines(name="s", path="~/x.jsonl")) == [tmp_path / "x.jsonl"]


@pytest.mark.parametrize(
    "source",
    [
        TextTree(name="t", path="nowhere"),
        TextTree(name="t", path="{stdlib}/json", pattern="*.nothing"),
        TextTree(name="t", path="{stdlib}/json", pattern="*.py", exclude=("**",)),
        JsonLines(name="t", path="nowhere.jsonl"),
        JsonLines(name="t", path="nowhere/*.jsonl"),
        JsonLines(name="t", path="{stdlib}/json"),
        Parquet(name="t", path="{stdlib}/json"),
        HuggingFace(name="t", path="nowhere", builder="csv"),
        HuggingFace(name="t", path="{stdlib}/json", builder="disk"),
    ],
    ids=lambda source: f"{source.kind} {source.path}",
)
def test_a_source_without_files_is_the_users_error(source: SourceSpec) -> None:
    with pytest.raises(UserError, match="source 't': no"):
        list_files(source)


def test_the_state_of_sources_changes_with_any_file(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("text")
        os.utime(tmp_path / name, ns=(10**18, 10**18))
    source = TextTree(name="t", path=str(tmp_path))

    def states() -> Iterator[str]:
        yield source_state([list_files(source)])
        yield source_state([list_files(source), []])
        yield source_state([list_files(replace_pattern(source, "a.txt"))])
        os.utime(tmp_path / "a.txt", ns=(10**18, 10**18 + 1))
        yield source_state([list_files(source)])
        (tmp_path / "a.txt").write_text("longer text")
        os.utime(tmp_path / "a.txt", ns=(10**18, 10**18))
        yield source_state([list_files(source)])
        (tmp_path / "b.txt").rename(tmp_path / "c.txt")
        yield source_state([list_files(source)])

    found = list(states())
    assert len(set(found)) == len(found)
    assert source_state([list_files(source)]) == found[-1], "and with nothing else"


def replace_pattern(source: TextTree, pattern: str) -> TextTree:
    return source.model_copy(update={"pattern": pattern})


def test_units_have_names_in_their_order() -> None:
    unit = Unit(3, 0, ())
    assert sorted([replace(unit, number=n).name for n in (2, 10, 1)]) == [f"u000000{n}" for n in (1, 2)] + ["u0000010"]
