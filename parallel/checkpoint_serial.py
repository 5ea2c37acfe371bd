"""Checkpoints on one process, tensor by tensor: what tools that convert, compare and average them stand on.

No tensor needs to fit in memory whole: both sides work in runs of rows (of the first dimension).
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from parallel.checkpoint_files import BoxReader, Piece, WrittenFile, tensor_chunks, write_file
from parallel.checkpoint_manifest import ITEM_BYTES, Manifest, StoredBox, StoredFile, StoredTensor
from parallel.checkpoint_store import read_boxes
from parallel.checkpoint_write import sync_folder, write_manifest, write_refused

RUN_BYTES = 256 * 2**20  # rows read, changed and written at a time
FILE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class LazyTensor:
    """A whole tensor that is made run by run; `rows(first, count)` gives rows [first, first + count) as `dtype`.

    A tensor without dimensions is given by `rows(0, 1)`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    rows: Callable[[int, int], Tensor]

    def runs(self) -> Iterator[tuple[int, int]]:
        """(first, count) of runs of rows that together are the tensor, each near RUN_BYTES at most."""
        yield from runs_of(self.shape, self.dtype)


def runs_of(shape: tuple[int, ...], dtype: str) -> Iterator[tuple[int, int]]:
    """(first, count) of runs of rows of about RUN_BYTES."""
    if not shape:
        yield 0, 1
        return
    step = max(1, RUN_BYTES // max(1, math.prod(shape[1:]) * ITEM_BYTES[dtype]))
    for first in range(0, shape[0], step):
        yield first, min(step, shape[0] - first)


class WholeReader:
    """Reads whole tensors, or rows of them, from a checkpoint of any layout. A context manager.

    Raises:
        UserError: as `Manifest.read`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.manifest = folder, Manifest.read(folder)
        self._boxes = BoxReader(folder, self.manifest)

    def __enter__(self) -> WholeReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._boxes.close()

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Rows [first, first + count) of a tensor, in the type it is stored in."""
        stored = self.manifest.tensors[name]
        target = torch.empty((count, *stored.shape[1:]) if stored.shape else (), dtype=getattr(torch, stored.dtype))
        offset = (first, *([0] * (len(stored.shape) - 1))) if stored.shape else ()
        read_boxes(self._boxes, name, stored, [(offset, target)])
        return target

    def lazy(self, name: str, new_name: str | None = None) -> LazyTensor:
        """A tensor as it is stored, to be written elsewhere."""
        stored = self.manifest.tensors[name]
        return LazyTensor(
            new_name or name, stored.shape, stored.dtype, lambda first, count: self.rows(name, first, count)
        )


def write_whole(folder: Path, tensors: Iterable[LazyTensor], document: dict[str, Any]) -> Manifest:
    """A new checkpoint of whole tensors; it appears at once and complete, or not at all.

    Raises:
        UserError: something stands at `folder` already, or the disk refuses.
    """
    if folder.exists():
        raise UserError(f"{folder} exists", "a new folder", "choose another, or move it away")
    aside = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        files: list[StoredFile] = []
        described: dict[str, StoredTensor] = {}
        for group in _groups(tensors):
            pieces = [Piece(t.name, (0,) * len(t.shape), t.shape, t.dtype, _chunks(t)) for t in group]
            written: WrittenFile = write_file(aside / f"weights-{len(files):05d}.safetensors", pieces)
            for tensor, piece, (start, checksum) in zip(group, pieces, written.boxes, strict=True):
                box = StoredBox(piece.offset, piece.shape, len(files), start, checksum)
                described[tensor.name] = StoredTensor(tensor.shape, tensor.dtype, (box,))
            files.append(written.file)
        manifest = Manifest(document, tuple(files), described)
        write_manifest(aside, manifest)
        aside.rename(folder)
        sync_folder(folder.parent)
        return manifest
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise write_refused(error, folder) from error
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _groups(tensors: Iterable[LazyTensor]) -> Iterator[list[LazyTensor]]:
    held: list[LazyTensor] = []
    size = 0
    for tensor in tensors:
        held.append(tensor)
        size += math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]
        if size >= FILE_BYTES:
            yield held
            held, size = [], 0
    if held:
        yield held


def _chunks(tensor: LazyTensor) -> Callable[[], Iterator[memoryview]]:
    def chunks() -> Iterator[memoryview]:
        for first, count in tensor.runs():
            yield from tensor_chunks(tensor.rows(first, count))

    return chunks
