"""The safetensors files of a Hugging Face folder: written and read in runs of rows."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from configs.errors import UserError
from data_prep.storage import write_atomically
from parallel.checkpoint_files import BoxReader, Piece, tensor_chunks, write_file
from parallel.checkpoint_manifest import ITEM_BYTES, Manifest, StoredBox, StoredFile, StoredTensor
from parallel.checkpoint_serial import LazyTensor, runs_of
from parallel.checkpoint_store import read_boxes
from pretrain.weights import num_values

SHARD_BYTES = 4 * 2**30
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_READABLE = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_MAX_HEAD_BYTES = 100_000_000  # safetensors' own bound
_FETCH = "fetch or copy the file again in full"


# ---- writing --------------------------------------------------------------------------------------------------------
class NamedPiece(Piece):
    """A whole tensor under its plain name."""

    @property
    def key(self) -> str:
        return self.name


def write_shards(folder: Path, tensors: Sequence[LazyTensor], shard_bytes: int) -> list[str]:
    """Write tensors into files of at most `shard_bytes` (or one tensor), with an index if there are several.

    Raises:
        OSError: as the system says.
    """
    groups = list(_shards(tensors, shard_bytes))
    names: list[str] = []
    places: dict[str, str] = {}
    for number, group in enumerate(groups, 1):
        name = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_file(
            folder / name, [NamedPiece(t.name, (0,) * len(t.shape), t.shape, t.dtype, _chunks(t)) for t in group]
        )
        places |= dict.fromkeys((tensor.name for tensor in group), name)
        names.append(name)
    if len(groups) > 1:
        total = sum(num_bytes(tensor) for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        write_atomically(folder / INDEX, json.dumps(index, indent=2).encode() + b"\n")
        names.append(INDEX)
    return names


def num_bytes(tensor: LazyTensor) -> int:
    return num_values(tensor.shape) * ITEM_BYTES[tensor.dtype]


def _shards(tensors: Sequence[LazyTensor], shard_bytes: int) -> Iterator[list[LazyTensor]]:
    held: list[LazyTensor] = []
    size = 0
    for tensor in tensors:
        if held and size + num_bytes(tensor) > shard_bytes:
            yield held
            held, size = [], 0
        held.append(tensor)
        size += num_bytes(tensor)
    yield held


def _chunks(tensor: LazyTensor) -> Callable[[], Iterator[memoryview]]:
    def chunks() -> Iterator[memoryview]:
        for first, count in runs_of(tensor.shape, "float32"):  # what is stored is wider than what is written
            yield from tensor_chunks(tensor.rows(first, count))

    return chunks


# ---- reading --------------------------------------------------------------------------------------------------------
class Shards:
    """All tensors of a folder, none of them read yet. A context manager.

    Attributes:
        shapes: of each tensor.
        dtypes: that are met, safetensors' names.

    Raises:
        UserError: no safetensors there, a file of them is missing or cut short, or holds what is not a float.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.dtypes: set[str] = set()
        self._tensors: dict[str, StoredTensor] = {}
        files = []
        for number, name in enumerate(_file_names(folder)):
            file, entries = _read_head(folder / name)
            self._add(file, number, entries)
            files.append(file)
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}
        self._boxes = BoxReader(folder, Manifest({}, tuple(files), self._tensors))

    def __enter__(self) -> Shards:
        return self

    def __exit__(self, *_: object) -> None:
        self._boxes.close()

    def _add(self, file: StoredFile, number: int, entries: dict[str, _Entry]) -> None:
        for name, entry in entries.items():
            if name in self._tensors:
                raise UserError(f"{self.folder / file.name} holds {name}, as another file does", "each once", _FETCH)
            if entry.dtype not in _READABLE:
                found = f"{self.folder / file.name}: {name} is of type {entry.dtype}"
                raise UserError(found, f"one of {', '.join(_READABLE)}", "fetch or make the unquantised folder")
            self.dtypes.add(entry.dtype)
            box = StoredBox((0,) * len(entry.shape), entry.shape, number, file.head_bytes + entry.start, "")
            self._tensors[name] = StoredTensor(entry.shape, _READABLE[entry.dtype], (box,))
            if self._tensors[name].num_bytes != entry.end - entry.start:
                found = (
                    f"{self.folder / file.name}: {name} of shape {list(entry.shape)} in {entry.end - entry.start} bytes"
                )
                raise UserError(found, f"{self._tensors[name].num_bytes} bytes", _FETCH)

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Rows [first, first + count) of a tensor, as stored."""
        inner = self.shapes[name][1:]
        return self.part(name, (first, *([0] * len(inner))), (count, *inner))

    def part(self, name: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """A box of a tensor, as stored."""
        stored = self._tensors[name]
        target = torch.empty(shape, dtype=getattr(torch, stored.dtype))
        read_boxes(self._boxes, name, stored, [(offset, target)])
        return target


class _Entry(NamedTuple):
    """A tensor as the head of a safetensors file tells it."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # behind the head
    end: int


def _read_head(path: Path) -> tuple[StoredFile, dict[str, _Entry]]:
    """
    Raises:
        UserError: it is no safetensors file, or not all of one.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_MAX_HEAD_BYTES, size - 8):
                raise ValueError(f"a file of {size} bytes that announces a head of {length}")
            tree = json.loads(file.read(length))
        tree.pop("__metadata__", None)
        entries = {
            name: _Entry(entry["dtype"], tuple(map(int, entry["shape"])), *map(int, entry["data_offsets"]))
            for name, entry in tree.items()
        }
        end = max((entry.end for entry in entries.values()), default=0)
        if 8 + length + end != size:
            raise ValueError(f"{size} bytes, its head announces {8 + length + end}")
        if any(not 0 <= entry.start <= entry.end or min(entry.shape, default=1) < 0 for entry in entries.values()):
            raise ValueError("a tensor of negative size")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: {error}", "a whole safetensors file", _FETCH) from None
    return StoredFile(path.name, size, 8 + length, ""), entries


def _file_names(folder: Path) -> list[str]:
    if not (folder / INDEX).is_file():
        if (folder / SINGLE).is_file():
            return [SINGLE]
        pickled = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")))
        held = f"only {pickled[0]}, a pickle" if pickled else f"neither {SINGLE} nor {INDEX}"
        remedy = "load it there and save_pretrained(..., safe_serialization=True)" if pickled else _FETCH
        raise UserError(f"{folder} holds {held}", "weights as safetensors", remedy)
    try:
        placed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(placed.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{folder / INDEX}: {error}", "an index of safetensors files", _FETCH) from None
    strange = [name for name in names if Path(name).name != name]
    if strange:
        raise UserError(f"{folder / INDEX} names {strange[0]}", "files of the folder itself", _FETCH)
    if missing := [name for name in names if not (folder / name).is_file()]:
        found = f"{folder / missing[0]} is missing ({len(missing)} of {len(names)} files are)"
        raise UserError(found, f"all files that {INDEX} names", _FETCH)
    return names
