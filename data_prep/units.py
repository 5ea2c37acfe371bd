"""The pieces of work a corpus is cut into, in an order that depends on names alone.

Documents are numbered by unit and by their place in it. A finer or coarser cut numbers them in the same order, so that
nothing made of the corpus depends on how it was cut.
"""

from __future__ import annotations

import glob
import hashlib
import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from configs.corpus import CorpusConfig, HuggingFace, JsonLines, Parquet, SourceSpec, TextTree
from configs.errors import UserError

_COMPRESSED = (".gz", ".zst")
_PACKED = (*_COMPRESSED, ".parquet")
_JSONL_ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".json.zst", ".ndjson")
_ENDINGS = {"jsonl": _JSONL_ENDINGS, "parquet": (".parquet",)}
_UNPACKED = 4  # about how many bytes of text a compressed byte holds
_MAX_FILES = 4_096  # in a unit of small files


@dataclass(frozen=True)
class Unit:
    """Part of one source, read in one go.

    Attributes:
        number: counts the units of the corpus.
        source: counts the sources of the configuration.
        files: (number within the source, path), in order. Only units of one file may be part of it:
        start, stop: bytes of a plain JSON lines file, row groups of a parquet file, rows of a saved dataset; None is
            the end.
        skip, take: records behind `start` to pass over and to read; None is all. An archive cannot be entered in its
            middle, but what comes before can be passed over without a look.
        first_record: records of the file before the first of this unit; known once the source has been read.
        read_as: its number when the source was first read.
        bytes: on disk, for progress.
    """

    number: int
    source: int
    files: tuple[tuple[int, str], ...]
    start: int = 0
    stop: int | None = None
    skip: int = 0
    take: int | None = None
    first_record: int = 0
    read_as: int = 0
    bytes: int = 0

    def path(self, file: int) -> str:
        """Of a file by its number; a unit's files follow one another."""
        return self.files[file - self.files[0][0]][1]

    @property
    def name(self) -> str:
        """Of its files in the workspace."""
        return f"u{self.number:07d}"


def cut_into_units(config: CorpusConfig, files: list[list[Path]]) -> list[Unit]:
    """All units of a corpus.

    Args:
        files: of each source, as `list_files` gives them.
    """
    units: list[Unit] = []
    for number, (source, paths) in enumerate(zip(config.sources, files, strict=True)):
        for pieces, start, stop, size in _cut_source(source, paths, config.unit_bytes):
            units.append(Unit(len(units), number, pieces, start, stop, bytes=size))
    return units


def refine(units: list[Unit], records: list[int], cuts: list[list[int]]) -> list[Unit]:
    """The units again, after a first reading: each knows its first record, and those with much text are cut.

    Args:
        records: in the last file of each unit.
        cuts: of each unit: after how many of its records to cut.
    """
    fine: list[Unit] = []
    before: dict[tuple[int, int], int] = {}  # records seen, by source and file
    for unit, count, places in zip(units, records, cuts, strict=True):
        file = unit.source, unit.files[-1][0]
        base = before.get(file, 0)
        before[file] = base + count
        begins = [0, *places]
        for number, skip in enumerate(begins):
            take = places[number] - skip if number < len(places) else None
            size = unit.bytes // len(begins)
            part = replace(unit, skip=skip, take=take, first_record=base + skip, bytes=size)
            fine.append(replace(part, number=len(fine), read_as=unit.number))
    return fine


_Piece = tuple[tuple[tuple[int, str], ...], int, int | None, int]


def _cut_source(source: SourceSpec, paths: list[Path], unit_bytes: int) -> Iterator[_Piece]:
    """Large files are cut where their format allows; small ones share a unit."""
    together: list[tuple[int, str]] = []
    held = 0
    for number, path in enumerate(paths):
        size = _size(path) * (_UNPACKED if path.suffix in _PACKED else 1)
        if cuts := list(_cuts(source, path, size, unit_bytes)) if size > unit_bytes else []:
            if together:
                yield tuple(together), 0, None, held
                together, held = [], 0
            for start, stop in cuts:
                yield ((number, str(path)),), start, stop, size // len(cuts)
            continue
        if together and (held + size > unit_bytes or len(together) >= _MAX_FILES):
            yield tuple(together), 0, None, held
            together, held = [], 0
        together.append((number, str(path)))
        held += size
    if together:
        yield tuple(together), 0, None, held


def _cuts(source: SourceSpec, path: Path, size: int, unit_bytes: int) -> Iterator[tuple[int, int | None]]:
    if isinstance(source, JsonLines) and path.suffix not in _COMPRESSED:
        # The last piece has no end of its own: a file may have grown since its size was asked.
        yield from ((at, at + unit_bytes if at + unit_bytes < size else None) for at in range(0, size, unit_bytes))
    elif isinstance(source, Parquet):
        yield from _row_groups(path, unit_bytes)
    elif isinstance(source, HuggingFace) and source.builder == "disk":
        import datasets

        rows = len(datasets.load_from_disk(str(path)))
        step = max(1, rows * unit_bytes // max(1, size))
        yield from ((at, min(rows, at + step)) for at in range(0, rows, step))


def _row_groups(path: Path, unit_bytes: int) -> Iterator[tuple[int, int]]:
    import pyarrow
    import pyarrow.parquet

    try:
        meta = pyarrow.parquet.read_metadata(path)
    except (OSError, pyarrow.ArrowException):
        return  # told when it is read
    start, held = 0, 0
    for group in range(meta.num_row_groups):
        held += sum(meta.row_group(group).column(c).total_compressed_size for c in range(meta.num_columns))
        if held >= unit_bytes:
            yield start, group + 1
            start, held = group + 1, 0
    if start < meta.num_row_groups:
        yield start, meta.num_row_groups


def list_files(source: SourceSpec) -> list[Path]:
    """The files of a source, sorted.

    Raises:
        UserError: the path is missing, or no file matches.
    """
    path = Path(os.path.expanduser(source.path.replace("{stdlib}", sysconfig.get_path("stdlib"))))
    if isinstance(source, TextTree):
        if not path.is_dir():
            raise UserError(f"source {source.name!r}: no folder {path}", "a folder of text files", "mend its `path`")
        files, wanted = _walk(path, source), f"files matching {source.pattern!r} below {path}"
    elif isinstance(source, HuggingFace) and source.builder == "disk":
        saved = (path / "dataset_info.json").is_file() and (path / "state.json").is_file()
        files, wanted = [path] if saved else [], "a folder written by Dataset.save_to_disk"
    else:
        files, wanted = _globbed(path, _ENDINGS.get(source.kind, ("",))), "a file, a folder of files, or a glob"
    if not files:
        remedy = "mend its `path`, `pattern` or `exclude`"
        raise UserError(f"source {source.name!r}: no file matches in {source.path}", wanted, remedy)
    return files


def source_state(files: list[list[Path]]) -> str:
    """Twelve hex digits that change when a file of a source is added, removed, resized or touched."""
    digest = hashlib.sha256()
    for paths in files:
        for path in paths:
            status = path.stat()
            digest.update(os.fsencode(path) + f"\0{status.st_size}\0{status.st_mtime_ns}\0".encode())
        digest.update(b"\n")
    return digest.hexdigest()[:12]


def _size(path: Path) -> int:
    try:
        return sum(p.stat().st_size for p in path.iterdir()) if path.is_dir() else path.stat().st_size
    except OSError:
        return 0  # told when it is read


def _globbed(path: Path, endings: tuple[str, ...]) -> list[Path]:
    if path.is_dir():
        return sorted(found for found in path.rglob("*") if found.name.endswith(endings) and found.is_file())
    named = [str(path)] if path.exists() else glob.glob(str(path), recursive=True)
    return sorted({Path(name) for name in named if Path(name).is_file()})


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
