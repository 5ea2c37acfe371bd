"""Raw sources as a stream of documents, unit by unit.

A record that cannot be read is yielded as a `Reject`: one bad line never costs the corpus, and is never lost silently.
"""

from __future__ import annotations

import errno
import gzip
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson

from configs.corpus import HuggingFace, JsonLines, Parquet, SourceSpec, TextTree
from configs.errors import UserError
from data_prep.units import Unit

_ROWS_A_BATCH = 256  # of a table, in memory at a time
_SKIP_BYTES = 1 << 20
_PASSING = (errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ETIMEDOUT, errno.EHOSTDOWN)
_UNPACK_BYTES = 1 << 16  # at a time: what was unpacked in the call that meets an archive's cut is lost


@dataclass(frozen=True)
class Document:
    """One text; `file` counts the files of its source, `record` the records of the file, both from 0."""

    text: str
    file: int
    record: int


@dataclass(frozen=True)
class Reject:
    """One record left out, and why."""

    file: int
    record: int
    reason: str


@dataclass(frozen=True)
class Blank:
    """A line with nothing on it: counted, so that those behind it have their right numbers."""

    file: int
    record: int


Record = Document | Reject | Blank


def read_unit(source: SourceSpec, unit: Unit, max_bytes: int) -> Iterator[Record]:
    """Every record of a unit, in order.

    Args:
        max_bytes: a longer record is a reject, and is never held whole where its format allows.
    """
    for number, path in unit.files:
        for record in islice(_read_file(source, unit, number, Path(path), max_bytes), unit.take):
            if isinstance(record, Document):
                if not record.text:
                    record = Reject(record.file, record.record, "empty text")
                elif len(record.text) * 4 > max_bytes and (size := len(record.text.encode())) > max_bytes:
                    record = _too_long(record.file, record.record, size, max_bytes)
            yield record


def _read_file(source: SourceSpec, unit: Unit, number: int, path: Path, max_bytes: int) -> Iterator[Record]:
    if isinstance(source, TextTree):
        yield _read_text(path, number, max_bytes)
    elif isinstance(source, JsonLines):
        yield from _read_lines(source, unit, number, path, max_bytes)
    elif isinstance(source, Parquet):
        yield from _read_parquet(source, unit, number, path)
    else:
        yield from _read_hugging_face(source, unit, number, path)


def _read_text(path: Path, number: int, max_bytes: int) -> Record:
    try:
        size = path.stat().st_size
        if size > max_bytes:
            return _too_long(number, 0, size, max_bytes)
        # Decoding bytes keeps "\r\n" and a byte order mark as they are; text mode would not.
        return Document(path.read_bytes().decode("utf-8"), number, 0)
    except UnicodeDecodeError as error:
        return Reject(number, 0, f"not UTF-8: {error.reason} at byte {error.start}")
    except OSError as error:
        _raise_if_passing(error, path)
        return Reject(number, 0, f"cannot be read: {error.strerror}")


def _read_lines(source: JsonLines, unit: Unit, number: int, path: Path, max_bytes: int) -> Iterator[Record]:
    record = unit.first_record - 1
    # JSON's \uXXXX take three times the bytes of what they spell, control characters aside; and there are other fields.
    longest = max_bytes * 3 + 65_536
    try:
        with open_stream(path) as file:
            lines = islice(_lines(file, unit, longest), unit.skip, None)
            for record, line in enumerate(lines, start=unit.first_record):
                if isinstance(line, int):
                    yield _too_long(number, record, line, max_bytes)
                elif line.isspace():
                    yield Blank(number, record)
                else:
                    yield _parse_line(line, source.text_field, number, record)
    except (OSError, EOFError, zlib.error) as error:  # a cut or damaged archive: what came before it is kept
        _raise_if_passing(error, path)
        yield Reject(number, record + 1, f"the file cannot be read further: {error}")


def _lines(file: BinaryIO, unit: Unit, longest: int) -> Iterator[bytes | int]:
    """The lines that begin in [unit.start, unit.stop), to the end where that is None. Of a line longer than
    ``longest`` only its length."""
    position = unit.start
    if position:
        file.seek(position - 1)
        position += _skip_line(file) - 1
    while unit.stop is None or position < unit.stop:
        line = file.readline(longest + 1)
        if not line:
            return
        position += len(line)
        if len(line) > longest and not line.endswith(b"\n"):
            rest = _skip_line(file)
            position += rest
            yield len(line) + rest
        else:
            yield line


def _skip_line(file: BinaryIO) -> int:
    """Read past the end of the line; returns how many bytes that were."""
    skipped = 0
    while piece := file.readline(_SKIP_BYTES):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def open_stream(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked if its name ends in .gz or .zst. A truncated archive raises when its end is met."""
    if path.suffix == ".gz":
        return cast(BinaryIO, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        import pyarrow  # late: half a second that plain files need not pay

        # The zstandard package takes a truncated file for a whole one; Arrow does not.
        return cast(BinaryIO, io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), _UNPACK_BYTES))
    return path.open("rb", buffering=_SKIP_BYTES)


def _parse_line(line: bytes, field: str, number: int, record: int) -> Record:
    try:
        value = orjson.loads(line)
    except orjson.JSONDecodeError as error:  # also half a surrogate pair, and what is not UTF-8
        return Reject(number, record, f"malformed: {error}")
    if not isinstance(value, dict):
        return Reject(number, record, f"a JSON {type(value).__name__}, not an object")
    return _text_or_reject(value.get(field), field in value, field, number, record)


def _text_or_reject(text: Any, there: bool, field: str, number: int, record: int) -> Record:
    if isinstance(text, str):
        return Document(text, number, record)
    return Reject(number, record, f"field {field!r} is {type(text).__name__ if there else 'missing'}, not text")


def _read_parquet(source: Parquet, unit: Unit, number: int, path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    record, skip = unit.first_record, unit.skip
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as file:
            for group in range(unit.start, unit.stop if unit.stop is not None else file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows - skip
                if rows > 0:
                    yield from _read_row_group(file, path, group, skip, source.text_field, number, record)
                    record += rows
                skip = max(0, -rows)
    except (OSError, pyarrow.ArrowException) as error:
        _raise_if_passing(error, path)
        yield Reject(number, record, f"the file cannot be read further: {_one_line(error)}")


def _read_row_group(
    file: Any, path: Path, group: int, skip: int, field: str, number: int, record: int
) -> Iterator[Record]:
    """As many records as it has rows behind the first `skip`, whatever is wrong with it: those of others keep their
    numbers."""
    import pyarrow

    end, names = record + file.metadata.row_group(group).num_rows - skip, file.schema_arrow.names
    fault = "" if field in names else f"field {field!r} is missing; the columns are {', '.join(names)[:300]}"
    try:
        for batch in file.iter_batches(_ROWS_A_BATCH, row_groups=[group], columns=[field]) if not fault else ():
            for cell in batch.column(0)[skip:]:
                yield _cell(cell, field, number, record)
                record += 1
            skip = max(0, skip - batch.num_rows)
    except (OSError, pyarrow.ArrowException) as error:
        _raise_if_passing(error, path)
        fault = f"row group {group} cannot be read further: {_one_line(error)}"
    yield from (Reject(number, lost, fault) for lost in range(record, end))


def _cell(cell: Any, field: str, number: int, record: int) -> Record:
    try:
        return _text_or_reject(cell.as_py(), True, field, number, record)
    except UnicodeDecodeError as error:
        return Reject(number, record, f"not UTF-8: {error.reason} at byte {error.start}")


def _read_hugging_face(source: HuggingFace, unit: Unit, number: int, path: Path) -> Iterator[Record]:
    record, field = unit.first_record, source.text_field
    try:
        for row in islice(hugging_face_rows(source, path, unit), unit.skip, None):
            yield _text_or_reject(row.get(field), field in row, field, number, record)
            record += 1
    except UserError:
        raise
    except Exception as error:  # each loader has errors of its own
        _raise_if_passing(error, path)
        yield Reject(number, record, f"the file cannot be read further: {type(error).__name__}: {_one_line(error)}")


def hugging_face_rows(source: HuggingFace, path: Path, unit: Unit) -> Iterator[dict[str, Any]]:
    """Rows of one file, as the `datasets` library streams them.

    Raises:
        UserError: there is no such loader.
    """
    import datasets  # late: seconds that other sources need not pay

    datasets.disable_progress_bars()
    datasets.config.HF_HUB_OFFLINE = True  # else each file is counted on a server, with seconds of waiting for it
    if source.builder == "disk":
        rows = datasets.load_from_disk(str(path))
        yield from rows.select(range(unit.start, len(rows) if unit.stop is None else unit.stop))
        return
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as packaged

    if source.builder not in packaged:
        found = f"source {source.name!r}: builder={source.builder!r}"
        raise UserError(found, f"one of disk, {', '.join(sorted(packaged))}", "other loaders want a hub")
    yield from datasets.load_dataset(
        source.builder, data_files=str(path), split="train", streaming=True, **source.options
    )


def _raise_if_passing(error: BaseException, path: Path) -> None:
    """A disk that does not answer says nothing of the file: no reason to leave out the rest of it for good.

    Raises:
        UserError: the error is of that kind.
    """
    if getattr(error, "errno", None) in _PASSING:
        raise UserError(
            f"{path}: {error}", "a file that can be read now", "run the same command again when the disk answers"
        ) from error


def _too_long(number: int, record: int, size: int, most: int) -> Reject:
    return Reject(number, record, f"{size:,} bytes; at most {most:,} (max_document_bytes)")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
