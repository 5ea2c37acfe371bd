"""The files of a checkpoint: boxes written as they come, read by slices, verified byte for byte.

Plain safetensors, one key a box, so that other tools can open them. Written here and not by that library, because it
wants all tensors of a file copied together first, tells no checksum, and reads only by mapping the file.
"""

from __future__ import annotations

import errno
import math
import mmap
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import orjson
import torch
import xxhash
from torch import Tensor

from configs.errors import UserError
from parallel.checkpoint_manifest import ITEM_BYTES, Damaged, Manifest, StoredBox, StoredFile, StoredTensor, remedy_for

CHUNK_BYTES = 16 * 2**20  # written, read and hashed at a time
OPEN_FILES = 64  # of a checkpoint that may have thousands; a process may have 1,024 open as a rule
_CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16",
    "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
_ALIGN = 64


# ---- writing --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Piece:
    """A box on its way to a file; `chunks` gives its bytes in order, once."""

    name: str  # of the whole tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    chunks: Callable[[], Iterable[memoryview]]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def key(self) -> str:
        """Name of the box within its file: blocks.0.moe.experts.up/weight@4,0,0"""
        return f"{self.name}@{','.join(str(o) for o in self.offset)}"


@dataclass(frozen=True)
class WrittenFile:
    file: StoredFile
    boxes: list[tuple[int, str]]  # start and checksum of each piece, in the order they were given


def write_file(path: Path, pieces: Sequence[Piece]) -> WrittenFile:
    """Write one safetensors file and flush it to the disk.

    Raises:
        OSError: as the system says, with its number (a full disk, a folder that is gone, ...).
    """
    # Without gaps between them, values stay aligned to their size only if the widest come first.
    order = sorted(range(len(pieces)), key=lambda n: -ITEM_BYTES[pieces[n].dtype])
    starts, end = {}, 0
    for number in order:
        starts[number], end = end, end + pieces[number].num_bytes
    head = _head([(pieces[n], starts[n]) for n in order])
    checksums: dict[int, str] = {}
    with path.open("wb", buffering=0) as file:
        _write_all(file.fileno(), memoryview(head))
        for number in order:
            digest = xxhash.xxh3_128()
            for chunk in pieces[number].chunks():
                digest.update(chunk)
                _write_all(file.fileno(), chunk)
            checksums[number] = digest.hexdigest()
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
    assert size == len(head) + end, f"{path}: {size} bytes written, {len(head) + end} announced"
    stored = StoredFile(path.name, size, len(head), xxhash.xxh3_128_hexdigest(head))
    return WrittenFile(stored, [(len(head) + starts[n], checksums[n]) for n in range(len(pieces))])


def _head(placed: list[tuple[Piece, int]]) -> bytes:
    entries = {
        piece.key: {
            "dtype": _CODES[piece.dtype],
            "shape": piece.shape,
            "data_offsets": (start, start + piece.num_bytes),
        }
        for piece, start in placed
    }
    text = orjson.dumps({"__metadata__": {"format": "pt"}, **entries})
    text += b" " * (-(len(text) + 8) % _ALIGN)
    return len(text).to_bytes(8, "little") + text


def _write_all(descriptor: int, data: memoryview) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def tensor_chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in order; a tensor on a GPU passes through main memory in bounded pieces."""
    flat = tensor.detach().reshape(-1)
    step = max(1, CHUNK_BYTES // flat.element_size())
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step].cpu().view(torch.uint8)
        yield part.numpy().data


# ---- reading --------------------------------------------------------------------------------------------------------
class BoxReader:
    """Reads parts of boxes straight into tensors; keeps the files it used last open."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._open: dict[int, int] = {}  # file -> descriptor, the one used last at the end
        self._buffer = torch.empty(0, dtype=torch.uint8)

    def __enter__(self) -> BoxReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)
        self._open.clear()

    def read(self, dtype: str, box: StoredBox, offset: Sequence[int], target: Tensor) -> None:
        """Fill `target` with the part of a stored box that begins at `offset` within it and has the target's shape."""
        if (descriptor := self._open.pop(box.file, None)) is None:
            if len(self._open) >= OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            descriptor = os.open(self.folder / self.manifest.files[box.file].name, os.O_RDONLY)
        self._open[box.file] = descriptor
        self._read(box.file, box.start, dtype, box.shape, tuple(offset), target)

    def _read(
        self, file: int, start: int, dtype: str, shape: tuple[int, ...], offset: tuple[int, ...], target: Tensor
    ) -> None:
        """`shape` is what lies from `start` on; it loses leading dimensions until a run, or a few rows, fit at once."""
        lengths, row = tuple(target.shape), math.prod(shape[1:]) * ITEM_BYTES[dtype]
        # A single value counts as contiguous whatever its stride, but not as a run of bytes.
        together = target.is_contiguous() and (target.ndim == 0 or target.stride(-1) == 1)
        if together and lengths[1:] == shape[1:]:
            self._run(file, start + (offset[0] * row if shape else 0), dtype, target.view(-1))
        elif row > CHUNK_BYTES or (lengths[0] == 1 and len(shape) > 1):
            for number in range(lengths[0]):
                self._read(file, start + (offset[0] + number) * row, dtype, shape[1:], offset[1:], target[number])
        else:
            inner = tuple(slice(o, o + n) for o, n in zip(offset[1:], lengths[1:]))
            step = max(1, CHUNK_BYTES // row)
            for first in range(0, lengths[0], step):
                rows = min(step, lengths[0] - first)
                whole = self._scratch(rows * row).view(getattr(torch, dtype)).view(rows, *shape[1:])
                self._fill(file, start + (offset[0] + first) * row, whole)
                target[first : first + rows].copy_(whole[(slice(None), *inner)])

    def _run(self, file: int, start: int, dtype: str, target_N: Tensor) -> None:
        """N values that lie together, there and here."""
        stored, item = getattr(torch, dtype), ITEM_BYTES[dtype]
        if target_N.device.type == "cpu" and target_N.dtype == stored:
            self._fill(file, start, target_N)
            return
        step = CHUNK_BYTES // item
        for first in range(0, target_N.numel(), step):
            count = min(step, target_N.numel() - first)
            part = self._scratch(count * item).view(stored)
            self._fill(file, start + first * item, part)
            target_N[first : first + count].copy_(part)

    def _scratch(self, size: int) -> Tensor:
        if self._buffer.numel() < size:
            self._buffer = torch.empty(size, dtype=torch.uint8)
        return self._buffer[:size]

    def _fill(self, file: int, start: int, target: Tensor) -> None:
        data = target.view(-1).view(torch.uint8).numpy().data
        while data:
            count = os.preadv(self._open[file], [data[: 2**30]], start)
            if count == 0:
                path = self.folder / self.manifest.files[file].name
                raise Damaged(f"{path} ends at byte {start}", "all of its bytes", remedy_for(self.folder))
            data, start = data[count:], start + count


# ---- verifying ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Fault:
    """What is wrong with one box, or one file."""

    file: str
    tensor: str  # empty: the file as a whole, or its head
    what: str

    def __str__(self) -> str:
        return f"{self.file}: {self.tensor + ': ' if self.tensor else ''}{self.what}"


def verify(folder: Path, manifest: Manifest, part: int = 0, parts: int = 1, threads: int = 1) -> list[Fault]:
    """Read one of `parts` shares of the files and compare all their bytes with their checksums.

    Files go to parts as to the ranks that wrote them: a rank that then loads what it wrote finds it in its page cache.

    Raises:
        UserError: this process may not, or cannot now, read a file: which is no damage.
    """
    held: dict[int, list[tuple[StoredBox, str, StoredTensor]]] = {n: [] for n in range(len(manifest.files))}
    for name, tensor in manifest.tensors.items():
        for box in tensor.boxes:
            held[box.file].append((box, name, tensor))
    writers = [_writer(file.name, n) for n, file in enumerate(manifest.files)]
    if parts > len(set(writers)):
        writers = list(range(len(writers)))  # more readers than there were writers: each file to one of its own
    mine = [n for n, writer in enumerate(writers) if writer % parts == part]
    with ThreadPoolExecutor(max_workers=threads) as pool:
        found = pool.map(lambda n: _verify_file(folder, manifest.files[n], held[n]), mine)
        return [fault for faults in found for fault in faults]


def _writer(name: str, number: int) -> int:
    """The rank that wrote a file, or the file's own number."""
    rank = name.split("-")[1] if name.startswith("rank-") else ""
    return int(rank) if rank.isdecimal() else number


def _verify_file(folder: Path, file: StoredFile, held: list[tuple[StoredBox, str, StoredTensor]]) -> list[Fault]:
    faults, buffer = [], memoryview(mmap.mmap(-1, CHUNK_BYTES))
    try:
        descriptor = os.open(folder / file.name, os.O_RDONLY)
    except OSError as error:
        return [_unreadable(folder / file.name, error)]
    try:
        if (size := os.fstat(descriptor).st_size) != file.bytes:
            faults.append(Fault(file.name, "", f"{size} bytes, expected {file.bytes}"))
        parts = [(0, file.head_bytes, file.head_checksum, "")]
        parts += [(box.start, t.box_bytes(box), box.checksum, f"{name} at {list(box.offset)}") for box, name, t in held]
        for start, length, expected, name in sorted(parts):
            if (found := _checksum(descriptor, start, length, buffer)) != expected:
                what = f"bytes {start}..{start + length} of xxh128 {found[:12]}..., expected {expected[:12]}..."
                faults.append(Fault(file.name, name, what))
    except OSError as error:
        faults.append(_unreadable(folder / file.name, error))
    finally:
        os.close(descriptor)
    return faults


def _unreadable(path: Path, error: OSError) -> Fault:
    """A fault of the file; or a UserError where the fault may be this process's or this machine's alone."""
    if error.errno in (errno.ENOENT, errno.EIO):
        return Fault(path.name, "", error.strerror or str(error))
    raise UserError(
        f"{path} on {socket.gethostname()}: {error.strerror or error}",
        "a file that can be read",
        "mend permissions, limits (ulimit -n) or the mount there; the checkpoint itself may be sound",
    ) from error


def _checksum(descriptor: int, start: int, length: int, buffer: memoryview) -> str:
    digest, end = xxhash.xxh3_128(), start + length
    while start < end:
        count = os.preadv(descriptor, [buffer[: min(len(buffer), end - start)]], start)
        if count == 0:
            return "nothing there"
        digest.update(buffer[:count])
        start += count
    return digest.hexdigest()
