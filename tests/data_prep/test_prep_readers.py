"""Readers: every record is a document or a reject, in an order that depends on names alone."""

from __future__ import annotations

import fnmatch
import gzip
import json
import os
import sysconfig
from pathlib import Path

import pytest

from configs.corpus import JsonLines, TextTree
from configs.errors import UserError
from data_prep.readers import Document, Reject, list_files, read_documents


def test_text_is_kept_byte_for_byte(tmp_path: Path) -> None:
    texts = {"b/x.txt": "\ufeffone\r\ntwo\r\n", "a.txt": "é\t\n\n", "b/y.txt": "  \x00 "}
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    found = list(read_documents(TextTree(name="t", path=str(tmp_path))))
    assert found == [Document(texts[name], str(tmp_path / name)) for name in sorted(texts)]


def test_unreadable_text_is_rejected_not_fatal(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"ok \xff")
    (tmp_path / "b.txt").write_bytes(b"")
    (tmp_path / "c.txt").write_text("fine")
    bad, empty, good = read_documents(TextTree(name="t", path=str(tmp_path)))
    assert bad == Reject(str(tmp_path / "a.txt"), "not UTF-8: invalid start byte at byte 3")
    assert empty == Reject(str(tmp_path / "b.txt"), "empty text")
    assert good == Document("fine", str(tmp_path / "c.txt"))


def test_malformed_lines_are_rejected_with_their_number(tmp_path: Path) -> None:
    lines = {
        b'{"text": "first"}': None,
        b'{"text": "cut': "malformed",
        b"": "",  # a blank line is neither
        b'{"other": 1}': "missing",
        b'{"text": 12}': "is int",
        b'["text"]': "a JSON list",
        b'{"text": "\\ud800"}': "malformed",
        b'{"text": "\xff"}': "malformed",
        b"[" * 100_000: "malformed",
        b'{"text": ""}': "empty",
        b'{"text": "last"}': None,
    }
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = {record.origin: record for record in read_documents(JsonLines(name="j", path=str(path)))}
    for number, (line, reason) in enumerate(lines.items(), start=1):
        record = found.pop(f"{path}:{number}", None)
        if reason is None:
            assert record == Document(json.loads(line)["text"], f"{path}:{number}")
        elif reason:
            assert isinstance(record, Reject) and reason in record.reason
    assert not found


def test_globs_gzip_and_damaged_archives(tmp_path: Path) -> None:
    body = b"".join(json.dumps({"body": f"text {n} " + os.urandom(40).hex()}).encode() + b"\n" for n in range(200))
    (tmp_path / "b.jsonl").write_bytes(body)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(body))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(body)[:4000])
    found = list(read_documents(JsonLines(name="j", path=str(tmp_path / "*.jsonl*"), text_field="body")))
    texts = [record.text for record in found if isinstance(record, Document)]
    assert texts[:200] == texts[200:400] and texts[400:] == texts[: len(texts) - 400]
    (cut,) = (record for record in found if isinstance(record, Reject))
    assert cut.origin.startswith(str(tmp_path / "c.jsonl.gz")) and "cannot be read further" in cut.reason


def test_patterns_and_excludes_agree_with_path_glob() -> None:
    root = Path(sysconfig.get_path("stdlib"))
    for pattern in ("json/*.py", "json/**/*.py", "email/**/[!a-m]*.py", "xml/*/__init__.py", "j?on/*.py"):
        ours = list_files(TextTree(name="t", path="{stdlib}", pattern=pattern, exclude=("site-packages/**", "test/**")))
        assert ours == sorted(path for path in root.glob(pattern) if path.is_file())
    both = list_files(TextTree(name="t", path="{stdlib}/email", pattern="**/*.py"))
    fewer = list_files(TextTree(name="t", path="{stdlib}/email", pattern="**/*.py", exclude=("**/mime/**", "_*.py")))
    kept = [
        p for p in both if "mime" not in p.parts and not (fnmatch.fnmatch(p.name, "_*.py") and p.parent.name == "email")
    ]
    assert fewer == kept and len(kept) < len(both)


@pytest.mark.parametrize(
    "source",
    [
        TextTree(name="t", path="nowhere"),
        TextTree(name="t", path="{stdlib}/json", pattern="*.nothing"),
        JsonLines(name="t", path="nowhere.jsonl"),
        JsonLines(name="t", path="nowhere/*.jsonl"),
    ],
)
def test_a_source_without_files_is_the_users_error(source: TextTree | JsonLines) -> None:
    with pytest.raises(UserError, match="source 't': no"):
        list(read_documents(source))
