"""Readers: every record is a document, a reject or a blank, and each knows its place."""

from __future__ import annotations

import csv
import gzip
import json
import random
import socket
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from configs.corpus import HuggingFace, JsonLines, Parquet, SourceSpec, TextTree
from configs.errors import UserError
from data_prep.readers import Blank, Document, Record, Reject, read_unit
from data_prep.units import Unit, list_files

MOST = 2**24
TEXTS = ["plain", "ünï→😀", "two\nlines\r\n", "\ufeff mark, \x00 and \x85", " "]


def read(source: SourceSpec, max_bytes: int = MOST) -> list[Record]:
    """All records of a source, as one unit."""
    return list(read_unit(source, Unit(0, 0, tuple(enumerate(map(str, list_files(source))))), max_bytes))


def documents(texts: Sequence[str], file: int = 0) -> list[Record]:
    return [Document(text, file, record) for record, text in enumerate(texts)]


def jsonl(texts: Sequence[str], field: str = "text", **options: Any) -> bytes:
    return "".join(json.dumps({field: text}, **options) + "\n" for text in texts).encode()


def incompressible(lines: int, line_bytes: int) -> list[str]:
    draw = random.Random(0)
    return [f"{number} {draw.randbytes(line_bytes // 2).hex()}" for number in range(lines)]


# ---- text trees --------------------------------------------------------------------------------------------------
def test_text_is_kept_byte_for_byte(tmp_path: Path) -> None:
    texts = {"b/x.txt": "\ufeffone\r\ntwo\r\n", "a.txt": "é\t\n\n", "b/y.txt": "  \x00 "}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    assert read(TextTree(name="t", path=str(tmp_path))) == [
        Document(texts[name], file, 0) for file, name in enumerate(sorted(texts))
    ]


def test_unreadable_text_is_rejected_not_fatal(tmp_path: Path) -> None:
    for name, data in (("a", b"ok \xff"), ("b", b""), ("c", b"fine"), ("d", b"too long to be read"), ("e", b"gone")):
        (tmp_path / f"{name}.txt").write_bytes(data)
    source = TextTree(name="t", path=str(tmp_path))
    unit = Unit(0, 0, tuple(enumerate(map(str, list_files(source)))))
    (tmp_path / "e.txt").unlink()
    bad, empty, good, long, gone = read_unit(source, unit, 10)
    assert bad == Reject(0, 0, "not UTF-8: invalid start byte at byte 3")
    assert empty == Reject(1, 0, "empty text")
    assert good == Document("fine", 2, 0)
    assert long == Reject(3, 0, "19 bytes; at most 10 (max_document_bytes)")
    assert gone == Reject(4, 0, "cannot be read: No such file or directory")


# ---- JSON lines --------------------------------------------------------------------------------------------------
PACKED: dict[str, Callable[[bytes], bytes]] = {
    "": lambda data: data,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@pytest.mark.parametrize("ending", PACKED)
@pytest.mark.parametrize("options", [{}, {"ensure_ascii": False}], ids=["escaped", "UTF-8"])
def test_lines_are_read_plain_and_packed(tmp_path: Path, ending: str, options: dict[str, Any]) -> None:
    path = tmp_path / f"x.jsonl{ending}"
    path.write_bytes(PACKED[ending](jsonl(TEXTS, "body", **options)))
    assert read(JsonLines(name="j", path=str(path), text_field="body")) == documents(TEXTS)


def test_archives_of_several_members_are_read_to_their_end(tmp_path: Path) -> None:
    for ending in (".gz", ".zst"):
        path = tmp_path / f"x.jsonl{ending}"
        path.write_bytes(PACKED[ending](jsonl(TEXTS)) + PACKED[ending](jsonl(TEXTS)))
        assert read(JsonLines(name="j", path=str(path))) == documents(TEXTS * 2)


def test_malformed_lines_are_rejected_with_their_number(tmp_path: Path) -> None:
    lines = {
        b'{"text": "first"}': None,
        b'{"text": "cut': "malformed",
        b" \t\r": "",  # a blank line is neither, but counts
        b'{"other": 1}': "'text' is missing",
        b'{"text": 12}': "is int",
        b'{"text": null}': "is NoneType",
        b'["text"]': "a JSON list",
        b'{"text": "\\ud800"}': "malformed",
        b'{"text": "\xff"}': "malformed",
        b"[" * 60_000: "malformed",
        b'{"text": ""}': "empty",
        b'{"text": "longer than allowed"}': "19 bytes; at most 18",
        b"x" * 65_600: "65,601 bytes; at most 18",
        b'{"text": "last"}': None,
    }
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(lines))
    for record, (found, (line, reason)) in enumerate(
        zip(read(JsonLines(name="j", path=str(path)), max_bytes=18), lines.items(), strict=True)
    ):
        assert (found.file, found.record) == (0, record)
        if reason is None:
            assert found == Document(json.loads(line)["text"], 0, record)
        elif reason:
            assert isinstance(found, Reject) and reason in found.reason
        else:
            assert isinstance(found, Blank)


def test_a_text_is_measured_in_bytes_of_its_own(tmp_path: Path) -> None:
    """Neither escapes nor other fields make a document too long."""
    text = "→😀" * 10_000
    line = json.dumps({"other": "x" * 10_000, "text": text}).encode()
    (tmp_path / "x.jsonl").write_bytes(line)
    source, size = JsonLines(name="j", path=str(tmp_path)), len(text.encode())
    assert len(line) > 2 * size
    assert read(source, size) == documents([text])
    assert read(source, size - 1) == [Reject(0, 0, f"{size:,} bytes; at most {size - 1:,} (max_document_bytes)")]


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("kept", [0.4, 1.0], ids=["cut in the middle", "cut at the end"])
def test_what_comes_before_the_cut_of_an_archive_is_kept(tmp_path: Path, ending: str, kept: float) -> None:
    texts = incompressible(lines=800, line_bytes=1000)
    data = PACKED[ending](jsonl(texts))
    data = data[: int(kept * len(data)) - 4]
    (tmp_path / f"x.jsonl{ending}").write_bytes(data)
    *before, cut = read(JsonLines(name="j", path=str(tmp_path)))
    assert before == documents(texts[: len(before)])
    assert isinstance(cut, Reject) and cut.record == len(before) and "cannot be read further" in cut.reason
    unpack = zlib.decompressobj(31) if ending == ".gz" else zstandard.ZstdDecompressor().decompressobj()
    there = unpack.decompress(data)
    lost = there.count(b"\n") - len(before)
    assert 0 <= lost * 1000 <= 2**16 and len(before) > kept * 0.7 * len(texts)


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("data", [b"no archive at all", b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd"])
def test_what_is_no_archive_is_a_reject(tmp_path: Path, ending: str, data: bytes) -> None:
    (tmp_path / f"x.jsonl{ending}").write_bytes(data)
    (only,) = read(JsonLines(name="j", path=str(tmp_path)))
    assert isinstance(only, Reject) and "cannot be read further" in only.reason


# ---- Parquet -----------------------------------------------------------------------------------------------------
def write_parquet(path: Path, columns: dict[str, Any], rows_a_group: int = 100, **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=rows_a_group, **options)
    return path


def test_rows_of_all_groups_are_read_in_order(tmp_path: Path) -> None:
    texts = TEXTS + incompressible(lines=1000, line_bytes=10)
    for compression in ("none", "snappy", "zstd"):
        write_parquet(tmp_path / f"{compression}.parquet", {"n": range(1005), "body": texts}, compression=compression)
    found = read(Parquet(name="p", path=str(tmp_path), text_field="body"))
    assert found == [document for file in range(3) for document in documents(texts, file)]


def test_every_type_of_text_is_text(tmp_path: Path) -> None:
    for name, kind in {
        "a": pyarrow.string(), "b": pyarrow.large_string(), "c": pyarrow.string_view(),
        "d": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    }.items():  # fmt: skip
        write_parquet(tmp_path / f"{name}.parquet", {"text": pyarrow.array(TEXTS, pyarrow.string()).cast(kind)})
    found = read(Parquet(name="p", path=str(tmp_path)))
    assert found == [document for file in range(4) for document in documents(TEXTS, file)]


@pytest.mark.parametrize(
    ("cells", "kinds"),
    [
        (["a", None, "", "b"], [None, "is NoneType", "empty text", None]),
        ([1, 2], ["is int", "is int"]),
        ([b"a", b"\xff"], ["is bytes", "is bytes"]),
        ([["a"]], ["is list"]),
        (pyarrow.array([b"a", b"\xff"]).view(pyarrow.string()), [None, "not UTF-8: invalid start byte at byte 0"]),
    ],
    ids=["null", "integers", "bytes", "list", "not UTF-8"],
)
def test_cells_that_are_no_text_are_rejects(tmp_path: Path, cells: Any, kinds: list[str | None]) -> None:
    write_parquet(tmp_path / "x.parquet", {"text": cells})
    found = read(Parquet(name="p", path=str(tmp_path)))
    assert [record.record for record in found] == list(range(len(kinds)))
    for record, kind in zip(found, kinds):
        assert isinstance(record, Document) if kind is None else kind in getattr(record, "reason", "")


def test_a_missing_column_rejects_every_row(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"body": TEXTS, "id": range(5)}, rows_a_group=2)
    write_parquet(tmp_path / "b.parquet", {"text": TEXTS})
    found = read(Parquet(name="p", path=str(tmp_path)))
    reason = "field 'text' is missing; the columns are body, id"
    assert found == [*(Reject(0, record, reason) for record in range(5)), *documents(TEXTS, 1)]


@pytest.mark.parametrize("damage", ["truncated", "empty", "another format", "no footer"])
def test_a_file_that_is_no_parquet_is_one_reject(tmp_path: Path, damage: str) -> None:
    data = write_parquet(tmp_path / "a.parquet", {"text": TEXTS}).read_bytes()
    bad = {"truncated": data[: len(data) // 2], "empty": b"", "another format": jsonl(TEXTS), "no footer": data[:-8]}
    (tmp_path / "a.parquet").write_bytes(bad[damage])
    write_parquet(tmp_path / "b.parquet", {"text": TEXTS})
    cut, *others = read(Parquet(name="p", path=str(tmp_path)))
    assert isinstance(cut, Reject) and (cut.file, cut.record) == (0, 0) and "cannot be read further" in cut.reason
    assert "\n" not in cut.reason and others == documents(TEXTS, 1)


def damaged_parquet(path: Path, texts: list[str], rows_a_group: int, group: int) -> Path:
    """One row group overwritten; the footer is whole."""
    write_parquet(path, {"text": texts}, rows_a_group, compression="snappy", use_dictionary=False)
    column = pyarrow.parquet.read_metadata(path).row_group(group).column(0)
    data = bytearray(path.read_bytes())
    begin = column.data_page_offset
    data[begin : begin + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(data)
    return path


def test_a_damaged_row_group_costs_its_own_rows(tmp_path: Path) -> None:
    texts = incompressible(lines=50, line_bytes=50)
    damaged_parquet(tmp_path / "x.parquet", texts, rows_a_group=10, group=2)
    found = read(Parquet(name="p", path=str(tmp_path)))
    assert found[:20] == documents(texts)[:20] and found[30:] == documents(texts)[30:]
    for number, record in enumerate(found[20:30], start=20):
        assert isinstance(record, Reject) and record.record == number and "row group 2" in record.reason


# ---- the datasets library ----------------------------------------------------------------------------------------
@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The library's files go to a folder of the test; names asked of the network are listed, not resolved."""
    asked: list[Any] = []

    def note(host: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(host)
        raise socket.gaierror("no network in this test")

    monkeypatch.setattr(socket, "getaddrinfo", note)
    for name in ("HF_HOME", "HF_DATASETS_CACHE", "HF_MODULES_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / "hub"))
    return asked


ROWS = ["plain", "ünï→😀", "two\nlines", "a, b; c"]


def write_rows(builder: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The same rows for each loader, and what it must be told."""
    import datasets

    folder.mkdir()
    if builder == "csv":
        with (folder / "x.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file, delimiter=";").writerows([["text", "n"], *([text, 1] for text in ROWS)])
        return folder, {"delimiter": ";"}
    if builder == "json":
        (folder / "x.jsonl").write_bytes(jsonl(ROWS))
        return folder / "*.jsonl", {}
    if builder == "text":
        (folder / "x.txt").write_text("\0".join(ROWS), encoding="utf-8")
        return folder / "x.txt", {"sample_by": "document"}
    if builder == "arrow":
        table = pyarrow.table({"text": ROWS})
        with pyarrow.OSFile(str(folder / "x.arrow"), "wb") as sink, pyarrow.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        return folder, {}
    datasets.Dataset.from_dict({"text": ROWS}).save_to_disk(str(folder))
    return folder, {}


@pytest.mark.parametrize("builder", ["csv", "json", "text", "arrow", "disk"])
def test_local_files_of_the_datasets_library(tmp_path: Path, offline: list[Any], builder: str) -> None:
    path, options = write_rows(builder, tmp_path / "data")
    before = sorted((tmp_path / "data").rglob("*"))
    found = read(HuggingFace(name="h", path=str(path), builder=builder, options=options))
    assert found == (documents(["\0".join(ROWS)]) if builder == "text" else documents(ROWS))
    assert offline == [], "nothing is asked of a hub"
    assert sorted((tmp_path / "data").rglob("*")) == before, "nothing is written beside the sources"


def test_loaders_reject_what_they_cannot_read(tmp_path: Path, offline: list[Any]) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\nfine\n\xff\n")
    (tmp_path / "b.csv").write_bytes(b"text,n\n,1\nfine,2\n")
    (tmp_path / "c.csv").write_bytes(b"body\nx\ny\n")
    found = read(HuggingFace(name="h", path=str(tmp_path / "*.csv"), builder="csv"))
    by_file = [[record for record in found if record.file == file] for file in range(3)]
    (bad,) = by_file[0]
    assert isinstance(bad, Reject) and "Unicode" in bad.reason and "\n" not in bad.reason
    assert by_file[1] == [Reject(1, 0, "field 'text' is NoneType, not text"), Document("fine", 1, 1)]
    assert by_file[2] == [Reject(2, record, "field 'text' is missing, not text") for record in range(2)]


def test_an_unknown_loader_is_the_users_error(tmp_path: Path, offline: list[Any]) -> None:
    (tmp_path / "x.txt").write_text("fine")
    with pytest.raises(UserError, match=r"(?s)source 'h': builder='squad'.*one of disk, .*csv") as error:
        read(HuggingFace(name="h", path=str(tmp_path), builder="squad"))
    assert "hub" in error.value.remedy and offline == []
