"""Raw sources as a stream of documents, in an order that depends on names alone.

A record that cannot be read is yielded as a `Reject`: one bad line never costs the corpus, and is never lost silently.
"""

from __future__ import annotations

import glob
import gzip
import json
import os
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from configs.corpus import JsonLines, TextTree
from configs.errors import UserError


@dataclass(frozen=True)
class Document:
    """One text; ``origin`` is "file" or "file:line"."""

    text: str
    origin: str


@dataclass(frozen=True)
class Reject:
    """One record left out, and why."""

    origin: str
    reason: str


def read_documents(source: TextTree | JsonLines) -> Iterator[Document | Reject]:
    """Every document of a source, sorted by path, then by line.

    Raises:
        UserError: the path is missing, or no file matches.
    """
    for path in list_files(source):
        for record in _read_text(path) if isinstance(source, TextTree) else _read_lines(path, source.text_field):
            if isinstance(record, Document) and not record.text:
                yield Reject(record.origin, "empty text")
            else:
                yield record


def list_files(source: TextTree | JsonLines) -> list[Path]:
    """The files of a source, sorted.

    Raises:
        UserError: the path is missing, or no file matches.
    """
    path = Path(os.path.expanduser(source.path.replace("{stdlib}", sysconfig.get_path("stdlib"))))
    if isinstance(source, TextTree):
        if not path.is_dir():
            raise UserError(f"source {source.name!r}: no folder {path}", "a folder of text files", "mend its `path`")
        files, wanted = _walk(path, source), f"files matching {source.pattern!r} below {path}"
    else:
        named = [str(path)] if path.exists() else glob.glob(str(path), recursive=True)
        files, wanted = (
            sorted(Path(name) for name in named if Path(name).is_file()),
            "a .jsonl file, or a glob of files",
        )
    if not files:
        remedy = "mend its `path`, `pattern` or `exclude`"
        raise UserError(f"source {source.name!r}: no file matches in {source.path}", wanted, remedy)
    return files


def _walk(root: Path, source: TextTree) -> list[Path]:
    wanted, unwanted = _glob_regex(source.pattern), [_glob_regex(pattern) for pattern in source.exclude]

    def refuse(error: OSError) -> None:
        found = f"source {source.name!r}: {error}"
        raise UserError(found, "readable folders", "mend its permissions or exclude it") from error

    files: list[Path] = []
    for folder, subfolders, names in os.walk(root, onerror=refuse):
        inside = Path(folder).relative_to(root).as_posix()
        prefix = "" if inside == "." else inside + "/"
        # A folder excluded as a whole ("x/**") is not entered: site-packages may hold more files than the corpus.
        subfolders[:] = [name for name in subfolders if not any(r.fullmatch(f"{prefix}{name}/") for r in unwanted)]
        for name in names:
            relative = prefix + name
            kept = wanted.fullmatch(relative) and not any(r.fullmatch(relative) for r in unwanted)
            if kept and (root / relative).is_file():
                files.append(root / relative)
    return sorted(files)


def _glob_regex(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression: ``**`` crosses folders (also none at all), ``*`` and ``?`` do not."""
    rules = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}

    def translate(part: str) -> str:
        is_set = len(part) > 2 and part[0] == "[" and part[-1] == "]"
        return rules.get(part) or (part.replace("[!", "[^") if is_set else re.escape(part))

    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    return re.compile("".join(translate(part) for part in parts), re.DOTALL)


def _read_text(path: Path) -> Iterator[Document | Reject]:
    try:
        # Decoding bytes keeps "\r\n" and a byte order mark as they are; text mode would not.
        yield Document(path.read_bytes().decode("utf-8"), str(path))
    except UnicodeDecodeError as error:
        yield Reject(str(path), f"not UTF-8: {error.reason} at byte {error.start}")
    except OSError as error:
        yield Reject(str(path), f"cannot be read: {error.strerror}")


def _read_lines(path: Path, field: str) -> Iterator[Document | Reject]:
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _parse_line(line, field, f"{path}:{number}")
    except (OSError, EOFError, zlib.error) as error:  # a cut or damaged archive: what came before it is kept
        yield Reject(f"{path}:{number + 1}", f"the file cannot be read further: {error}")


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.suffix == ".gz" else path.open("rb")


def _parse_line(line: bytes, field: str, origin: str) -> Document | Reject:
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            return Reject(origin, f"a JSON {type(record).__name__}, not an object")
        if not isinstance(text := record.get(field), str):
            return Reject(
                origin, f"field {field!r} is {type(text).__name__ if field in record else 'missing'}, not text"
            )
        text.encode("utf-8")  # JSON can spell half a surrogate pair, which is no text
        return Document(text, origin)
    except (ValueError, RecursionError) as error:
        return Reject(origin, f"malformed: {error}")
