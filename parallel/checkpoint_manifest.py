"""What a checkpoint folder says of itself: `manifest.json`, written last. No ranks, no torch.

    manifest.json                      tensors (shape, boxes, where each lies, its checksum), files, document
    rank-00000-000.safetensors ...     the boxes a rank wrote

Names are those of the whole model and boxes are boxes of whole tensors, so any layout can read what any other wrote.
Every byte of every file belongs to its head or to one box, each with a checksum here; the manifest ends with one of
its own. Nothing is ever unpickled.
"""

from __future__ import annotations

import errno
import json
import math
import re
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import orjson
import xxhash

from configs.errors import UserError

FORMAT = 2
MANIFEST = "manifest.json"
ITEM_BYTES = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip
_BEGINNING = f'{{"format":{FORMAT},'.encode()
_ENDING = re.compile(rb',"xxh128":"([0-9a-f]{32})"\}\Z')
# What other programs leave in a checkpoint folder -> who wrote it, and what to do about it.
_FOREIGN = {
    "latest": ("DeepSpeed", "its pickles name parameters by layout; export them there to safetensors first"),
    "mp_rank_*_model_states.pt": ("DeepSpeed", "its pickles name parameters by layout; export them to safetensors"),
    ".metadata": ("torch.distributed.checkpoint", "its index is a pickle; export to safetensors with its own tools"),
    "config.json": ("Hugging Face transformers", "bring it in by `glam checkpoint import FOLDER --to NEW_FOLDER`"),
    "pytorch_model*.bin": ("Hugging Face transformers", "save it as safetensors there, then `glam checkpoint import`"),
}


class Damaged(UserError):
    """A checkpoint that is not, or not fully, what was written: another may stand in for it."""


class StoredBox(NamedTuple):
    """A box of a whole tensor, and where its bytes lie."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: int  # number in `Manifest.files`
    start: int  # of its bytes in the file
    checksum: str  # xxh3_128, hex


class StoredFile(NamedTuple):
    name: str
    bytes: int
    head_bytes: int  # before the first box
    head_checksum: str


@dataclass(frozen=True)
class StoredTensor:
    """A whole tensor, cut into boxes that do not overlap and leave nothing out."""

    shape: tuple[int, ...]
    dtype: str  # torch's name
    boxes: tuple[StoredBox, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def box_bytes(self, box: StoredBox) -> int:
        return math.prod(box.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says.

    Attributes:
        document: what a resume needs besides tensors, as JSON values.
    """

    document: dict[str, Any]
    files: tuple[StoredFile, ...]
    tensors: dict[str, StoredTensor]

    def encode(self) -> bytes:
        """JSON whose last key is the checksum of all bytes before it."""
        tensors = {
            name: {"shape": t.shape, "dtype": t.dtype, "boxes": [tuple(box) for box in t.boxes]}
            for name, t in self.tensors.items()
        }
        files = [tuple(file) for file in self.files]
        tree = {"format": FORMAT, "document": self.document, "files": files, "tensors": tensors}
        text = orjson.dumps(tree)[:-1]
        return text + b',"xxh128":"' + xxhash.xxh3_128_hexdigest(text).encode() + b'"}'

    @classmethod
    def decode(cls, data: bytes) -> Manifest:
        """From what `encode` made; its checksum is not compared here."""
        tree = orjson.loads(data)
        tensors = {
            name: StoredTensor(tuple(t["shape"]), t["dtype"], tuple(_box(*row) for row in t["boxes"]))
            for name, t in tree["tensors"].items()
        }
        return cls(tree["document"], tuple(StoredFile(*row) for row in tree["files"]), tensors)

    @classmethod
    def read(cls, folder: Path, sizes: bool = True) -> Manifest:
        """Read and check the manifest.

        Args:
            sizes: also look whether every file is there in full; for those who will not read them all.

        Raises:
            Damaged: no complete checkpoint, or a part of it is gone.
            UserError: a checkpoint of another program, or of another version of this one.
        """
        manifest = cls.decode(_read_checked(folder))
        for file in manifest.files if sizes else ():
            try:
                size: int | None = (folder / file.name).stat().st_size
            except OSError:
                size = None
            if size != file.bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise Damaged(f"{folder / file.name} {found}", f"{file.bytes} bytes", remedy_for(folder))
        return manifest


def remedy_for(folder: Path) -> str:
    """What to do about a damaged checkpoint."""
    return f"restore {folder} from a copy, or move it away to go on from the checkpoint before it"


def _box(offset: list[int], shape: list[int], file: int, start: int, checksum: str) -> StoredBox:
    return StoredBox(tuple(offset), tuple(shape), file, start, checksum)


def _read_checked(folder: Path) -> bytes:
    path = folder / MANIFEST
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        for pattern, (program, remedy) in _FOREIGN.items():
            if any(folder.glob(pattern)) or (pattern == "latest" and (folder.parent / pattern).is_file()):
                raise UserError(f"{folder} was written by {program}", "a checkpoint of ours", remedy) from None
        what = f"{folder} has no {MANIFEST}" if folder.is_dir() else f"{folder} is no folder"
        raise Damaged(what, "a complete checkpoint", remedy_for(folder)) from None
    except OSError as error:
        if error.errno == errno.EIO:
            raise Damaged(f"{path}: {error}", "a readable manifest", remedy_for(folder)) from None
        remedy = "mend permissions, limits (ulimit -n) or the mount; the checkpoint itself may be sound"
        raise UserError(f"{path} on {socket.gethostname()}: {error}", "a readable manifest", remedy) from None
    if (ending := _ENDING.search(data)) is None:
        if (other := _format_of(data)) is not None and other != FORMAT:
            raise _other_format(path, other)
        raise Damaged(f"{path} is cut short or not ours", "a complete manifest", remedy_for(folder))
    if xxhash.xxh3_128_hexdigest(data[: ending.start()]) != ending[1].decode():
        raise Damaged(f"{path} does not match its checksum", "the manifest as written", remedy_for(folder))
    if not data.startswith(_BEGINNING):
        raise _other_format(path, _format_of(data))
    return data


def _other_format(path: Path, found: Any) -> UserError:
    remedy = "read it with the version of this program that wrote it"
    return UserError(f"{path} of format {found!r}", f"a checkpoint of format {FORMAT}", remedy)


def _format_of(data: bytes) -> Any:
    """What a manifest without our ending says its format is; None where it says nothing."""
    try:
        tree = json.loads(data)
    except ValueError:
        return None
    return tree.get("format") if isinstance(tree, dict) else None
