"""One save under way: the snapshot, this rank's files, and on rank 0 the manifest and the commit."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex

from configs.errors import DiskRefused, UserError
from parallel.checkpoint_files import Piece, WrittenFile, tensor_chunks, write_file
from parallel.checkpoint_manifest import MANIFEST, Manifest, StoredBox, StoredFile, StoredTensor
from parallel.checkpoint_plan import Place, Plan, Tensors
from parallel.fragments import TensorBoxes
from parallel.mailbox import Mailbox

FILE_BYTES = 16 * 2**30  # a rank begins another file behind this much
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Write:
    """One save under way, on this rank; in a thread of its own after `start`, here in `run`. The folder is there.

    Ranks need each other only through the mailbox: each sends what it wrote, and rank 0 writes the manifest when all
    have. `commit` then makes the folder a checkpoint, on rank 0.
    """

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        tensors: Tensors,
        document: dict[str, Any],
        mailbox: Mailbox,
        commit: Callable[[], None] = lambda: None,
    ) -> None:
        self.plan, self.folder, self.document = plan, folder, document
        self.error: BaseException | None = None
        self.copied_bytes, self.ended = 0, 0.0  # of memory for the snapshot; time.perf_counter()
        self._mailbox, self._commit = mailbox, commit
        self._values = [_values(tensors[name], name, offset) for name, offset, _ in plan.mine]
        self._staged = threading.Event()
        self._thread: threading.Thread | None = None
        self._ready: torch.cuda.Event | None = None
        self._device: torch.device | None = None

    def start(self) -> None:
        """Copy the state and write the copy, both beside what goes on here. See `wait_until_copied`."""
        self._device = next((values.device for values in self._values if values.is_cuda), None)
        if self._device is not None:
            self._ready = torch.cuda.Event()
            self._ready.record()
        self._thread = threading.Thread(target=self._run, args=(True,), name="checkpoint", daemon=True)
        self._thread.start()

    def run(self) -> None:
        """Write at once, without a copy; an error is kept in `error`."""
        self._run(copy=False)

    def wait_until_copied(self) -> None:
        """Return when the state may change. Forward and backward passes only read it: to be asked before an update."""
        self._staged.wait()

    @property
    def done(self) -> bool:
        return self._thread is None or not self._thread.is_alive()

    def join(self, seconds: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(seconds)

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error

    def _run(self, copy: bool) -> None:
        rank, topic = self._mailbox.rank, str(self.folder)
        message: list[WrittenFile] | UserError | str
        try:
            if copy:
                self._values = self._copy_all()
            self._staged.set()
            message = self._write_mine(rank)
        except BaseException as error:
            self.error = error
            message = error if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        finally:
            self._staged.set()
            self._values = []
        try:
            self._mailbox.send(topic, message)
            if rank == 0:
                self._finish(self._mailbox.collect(topic))
        except BaseException as error:
            self.error = self.error or error
        self.ended = time.perf_counter()

    def _copy_all(self) -> list[Tensor]:
        self.copied_bytes = sum(values.nbytes for values in self._values)
        if self._ready is None:
            return [values.detach().clone() for values in self._values]
        # On a GPU: on a stream of its own, behind what was queued when the save was asked for. Into pageable memory:
        # torch's pinned allocator rounds each block up to a power of two, and never gives it back.
        torch.cuda.set_device(self._device)  # a new thread's is GPU 0, where the stream's end would make a context
        stream = torch.cuda.Stream(device=self._device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            stream.wait_event(self._ready)
            return [values.detach().to("cpu", copy=True) for values in self._values]

    def _write_mine(self, rank: int) -> list[WrittenFile]:
        pieces = [_piece(place, values) for place, values in zip(self.plan.mine, self._values, strict=True)]
        written = []
        try:
            for number, group in enumerate(_bins(pieces)):
                written.append(write_file(self.folder / f"rank-{rank:05d}-{number:03d}.safetensors", group))
        except OSError as error:
            raise write_refused(error, self.folder) from error
        return written

    def _finish(self, messages: list[list[WrittenFile] | UserError | str]) -> None:
        for rank, message in enumerate(messages):
            if isinstance(message, UserError):
                raise message
            if isinstance(message, str):
                raise RuntimeError(f"rank {rank} could not write its part of {self.folder}: {message}")
        files: list[StoredFile] = []
        boxes: dict[str, list[StoredBox]] = {name: [] for name in self.plan.described}
        for places, written in zip(self.plan.everyone, messages, strict=True):
            assert isinstance(written, list)
            numbered = [(len(files) + n, start, checksum) for n, w in enumerate(written) for start, checksum in w.boxes]
            for (name, offset, shape), (file, start, checksum) in zip(places, numbered, strict=True):
                boxes[name].append(StoredBox(offset, shape, file, start, checksum))
            files += [w.file for w in written]
        tensors = {name: StoredTensor(*self.plan.described[name], tuple(found)) for name, found in boxes.items()}
        try:
            for stored in files:  # all said to be there, each by its writer; the folder may have been swept since
                if (self.folder / stored.name).stat().st_size != stored.bytes:
                    raise OSError(errno.EIO, "not in full where it was written", str(self.folder / stored.name))
            write_manifest(self.folder, Manifest(self.document, tuple(files), tensors))
            self._commit()
        except OSError as error:
            raise write_refused(error, self.folder) from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """The last file of a checkpoint; all others have been flushed."""
    with (folder / MANIFEST).open("wb") as file:
        file.write(manifest.encode())
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_refused(error: OSError, folder: Path) -> DiskRefused:
    """What the system said when a checkpoint could not be written, as a user wants it told."""
    if error.errno in _DISK_FULL:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        return DiskRefused(
            f"no room for a checkpoint in {folder} ({shutil.disk_usage(there).free / 2**30:.2f} GiB free): {error}",
            "room for one more checkpoint",
            "free space, raise the quota, or choose another disk (run_dir=... of a run, --to of a tool); what was "
            "there is untouched",
        )
    return DiskRefused(
        f"a checkpoint could not be written: {error}",
        f"a folder that can be written at {folder}",
        "see whether it was removed, its disk fell out or its permissions changed; earlier checkpoints are untouched",
    )


def _bins(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Pieces in order, cut so that each file stays near FILE_BYTES."""
    held: list[Piece] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += piece.num_bytes
        if size >= FILE_BYTES:
            yield held
            held, size = [], 0
    if held:
        yield held


def _piece(place: Place, values: Tensor) -> Piece:
    name, offset, shape = place
    dtype = str(values.dtype).removeprefix("torch.")
    return Piece(name, offset, shape, dtype, lambda: tensor_chunks(values))


def _values(held: Tensor | TensorBoxes, name: str, offset: tuple[int, ...]) -> Tensor:
    return held.values_at(MetadataIndex(name, torch.Size(offset))) if isinstance(held, TensorBoxes) else held
