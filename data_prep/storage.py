"""Small duties towards a file system: atomic files, checksums, full disks, one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from configs.errors import UserError

_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_DENIED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
_READ_BYTES = _WRITE_BYTES = 1 << 20
TEMPORARY = ".tmp"


def publish(temporary: Path, final: Path) -> None:
    """Give a finished file its name: either the old file or all of the new one is there, also after a power cut."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(final)


def temporary_name(path: Path) -> Path:
    """A name beside ``path`` of this process's own: a worker that outlives its killed run may write the same file."""
    return path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}{TEMPORARY}")


@contextmanager
def written_atomically(path: Path) -> Iterator[BinaryIO]:
    """A file to write; it gets its name when the block ends well, else it leaves nothing."""
    temporary = temporary_name(path)
    try:
        with temporary.open("wb", buffering=_WRITE_BYTES) as file:
            yield file
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, data: bytes) -> None:
    """Write a small file under a temporary name, then rename it; a failed write leaves nothing."""
    with written_atomically(path) as file:
        file.write(data)


def save_array(path: Path, values: npt.NDArray[Any]) -> None:
    """Write an array as .npy, atomically."""
    with written_atomically(path) as file:
        # Through `write` alone: into a real file numpy writes on its own, and a full disk loses its number on the way.
        np.save(SimpleNamespace(write=file.write), values, allow_pickle=False)


def remove_temporary(folder: Path) -> None:
    """Remove what a killed run was writing, here and in all folders below."""
    for left in folder.rglob(f"*{TEMPORARY}"):
        left.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; nothing there is fine."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a whole file, read in bounded pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_READ_BYTES):
            digest.update(piece)
    return digest.hexdigest()


@contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Turn a full or forbidden disk below ``folder`` into a UserError; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise UserError(
                f"{folder}: {error.strerror}",
                "room for the tokens twice, and about 300 bytes a document, until the shards are made",
                "free space or raise the quota and run the same command again: it goes on from what is done",
            ) from error
        if error.errno in _DENIED:
            remedy = "mend its permissions, or choose another output=PATH"
            raise UserError(f"{folder}: {error}", "a folder that can be written", remedy) from error
        raise


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Hold an advisory lock on an existing folder.

    Raises:
        UserError: another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "wait for it, or choose another output=PATH"
            raise UserError(f"{folder} is being written by another process", "one writer at a time", remedy) from None
        except OSError:
            pass  # some network file systems lock no folders; then two writers at once go unnoticed
        yield
    finally:
        os.close(handle)
