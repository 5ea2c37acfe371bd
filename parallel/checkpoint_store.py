"""One checkpoint folder: torch.distributed.checkpoint plans who writes what, these classes put it on disk.

    manifest.json                      tensors (shape, boxes, where each box lies), files (bytes, sha256), document
    rank-00000-000.safetensors ...     the boxes a rank wrote

Names are those of the whole model and boxes are boxes of whole tensors, so any layout can read what any other wrote.
Nothing is ever unpickled: the manifest is JSON, the tensors are safetensors. The manifest is written last; a folder
without one is no checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException as CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_loader import load as load_planned
from torch.distributed.checkpoint.state_dict_saver import save as save_planned
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from configs.errors import UserError
from parallel.fragments import TensorBoxes

MANIFEST = "manifest.json"
FORMAT = 1
FILE_BYTES = 2 * 2**30  # tensors are copied once on their way to a file: this bounds the copy

Tensors = Mapping[str, Tensor | TensorBoxes]


def save(folder: Path, tensors: Tensors, document: dict[str, Any]) -> None:
    """Write this rank's boxes; all ranks call it together. Replicated plain tensors are written by one rank.

    Args:
        folder: an empty or absent folder, seen by all ranks.
        document: what else a resume needs, as JSON values; rank 0's is kept.
    """
    save_planned(dict(tensors), storage_writer=_Writer(folder, document), planner=_SavePlanner(), no_dist=_alone())


def load(folder: Path, tensors: Tensors) -> None:
    """Fill `tensors` in place from a checkpoint of any layout; all ranks call it together."""
    load_planned(dict(tensors), storage_reader=_Reader(folder), planner=_LoadPlanner(), no_dist=_alone())


def _alone() -> bool:
    """Whether this process is on its own, which is no mistake here (`glam generate`, `glam parity`)."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    return not dist.is_initialized()


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says."""

    document: dict[str, Any]
    tensors: dict[str, dict[str, Any]]  # name -> {"shape", "dtype", "boxes": [{"offset", "shape", "file"}]}
    files: dict[str, dict[str, Any]]  # name -> {"bytes", "sha256"}

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Read and check the manifest, and that every file is there in full (sizes, not contents).

        Raises:
            UserError: the folder is no checkpoint of ours, was only half written, or lost a part.
        """
        remedy = f"move {folder} away to go on from the checkpoint before it, or restore it from a copy"
        try:
            tree = json.loads((folder / MANIFEST).read_text())
        except FileNotFoundError:
            raise UserError(f"{folder} has no {MANIFEST}", "a complete checkpoint", remedy) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / MANIFEST}: {error}", "a readable manifest", remedy) from None
        if (
            not isinstance(tree, dict)
            or tree.get("format") != FORMAT
            or not {"document", "tensors", "files"} <= tree.keys()
        ):
            found = tree.get("format") if isinstance(tree, dict) else type(tree).__name__
            raise UserError(f"{folder / MANIFEST} of format {found!r}", f"a checkpoint of format {FORMAT}", remedy)
        for name, entry in tree["files"].items():
            path = folder / name
            size = path.stat().st_size if path.exists() else None
            if size != entry["bytes"]:
                found = "is missing" if size is None else f"has {size} bytes"
                raise UserError(f"{path} {found}", f"{entry['bytes']} bytes", remedy)
        return cls(tree["document"], tree["tensors"], tree["files"])


def verify(folder: Path, part: int = 0, parts: int = 1) -> None:
    """Compare the checksums of every `parts`-th file from number `part` on, so that ranks can share the work."""
    files = Manifest.read(folder).files
    for name in sorted(files)[part::parts]:
        found = _sha256(folder / name)
        if found != files[name]["sha256"]:
            raise UserError(
                f"{folder / name} with sha256 {found[:12]}...",
                f"sha256 {files[name]['sha256'][:12]}...: the file was damaged after it was written",
                f"move {folder} away to go on from the checkpoint before it, or restore it from a copy",
            )


class _SavePlanner(DefaultSavePlanner):
    """Finds the values of a planned box, in our boxes too."""

    def lookup_object(self, index: MetadataIndex) -> Any:
        held = self.state_dict[index.fqn]
        return held.values_at(index) if isinstance(held, TensorBoxes) else super().lookup_object(index)


class _LoadPlanner(DefaultLoadPlanner):
    """Plans and finds the place for each box, in our boxes too."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The default first replaces what is neither tensor nor plain value by None: our boxes.
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator, self.mappings = metadata, is_coordinator, {}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        items = []
        for name, wanted in self.state_dict.items():
            if isinstance(wanted, Tensor):
                chunks = [ChunkStorageMetadata(torch.Size([0] * wanted.ndim), wanted.shape)]
            else:
                chunks = wanted.chunks()
            stored = self.metadata.state_dict_metadata[name]
            assert isinstance(stored, TensorStorageMetadata)
            items += create_read_items_for_chunk_list(name, stored, chunks)
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        held = self.state_dict[index.fqn]
        return held.values_at(index) if isinstance(held, TensorBoxes) else super().lookup_tensor(index)


class _Writer(StorageWriter):
    """Writes the items of a plan into safetensors files of bounded size, one key a box."""

    def __init__(self, folder: Path, document: dict[str, Any]) -> None:
        self.folder, self.document = folder, document
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        results = []
        for number, items in enumerate(_bins(plan.items)):
            name = f"rank-{self.rank:05d}-{number:03d}.safetensors"
            # Boxes are views of one flat buffer, which safetensors refuses to take apart itself.
            tensors = {_key(item.index): _resolve(planner, item).detach().cpu().clone() for item in items}
            save_file(tensors, self.folder / name)
            os.chmod(self.folder / name, 0o644)  # safetensors leaves 0600: a group could not resume its own run
            entry = {"file": name, "bytes": _sync(self.folder / name), "sha256": _sha256(self.folder / name)}
            results += [WriteResult(item.index, tensors[_key(item.index)].nbytes, entry) for item in items]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator, once all ranks have written: the manifest, last."""
        place = {_key(result.index): result.storage_data for rank in results for result in rank}
        files = {e["file"]: {"bytes": e["bytes"], "sha256": e["sha256"]} for e in place.values()}
        tensors = {}
        for name, stored in metadata.state_dict_metadata.items():
            assert isinstance(stored, TensorStorageMetadata)
            boxes = [
                {
                    "offset": list(c.offsets),
                    "shape": list(c.sizes),
                    "file": place[_key(MetadataIndex(name, c.offsets))]["file"],
                }
                for c in stored.chunks
            ]
            dtype = str(stored.properties.dtype).removeprefix("torch.")
            tensors[name] = {"shape": list(stored.size), "dtype": dtype, "boxes": boxes}
        text = json.dumps({"format": FORMAT, "document": self.document, "files": files, "tensors": tensors})
        (self.folder / MANIFEST).write_text(text)
        _sync(self.folder / MANIFEST)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


class _Reader(StorageReader):
    """Reads boxes by slices: no rank ever holds more than what it asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = Manifest.read(folder)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        described, place = {}, {}
        for name, entry in self.manifest.tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(b["offset"]), torch.Size(b["shape"])) for b in entry["boxes"]]
            properties = TensorProperties(dtype=getattr(torch, entry["dtype"]))
            described[name] = TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)
            for chunk, box in zip(chunks, entry["boxes"]):
                place[MetadataIndex(name, chunk.offsets)] = box["file"]
        return Metadata(described, storage_data=place)  # type: ignore[arg-type]

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.place = {_key(index): file for index, file in metadata.storage_data.items()}

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        by_file: dict[str, list[Any]] = {}
        for item in plan.items:
            by_file.setdefault(self.place[_key(item.storage_index)], []).append(item)
        for name, items in by_file.items():
            with safe_open(self.folder / name, framework="pt") as file:
                for item in items:
                    box = tuple(slice(o, o + n) for o, n in zip(item.storage_offsets, item.lengths))
                    stored = file.get_slice(_key(item.storage_index))
                    target = planner.resolve_tensor(item).detach()
                    target.copy_(stored[box] if box else file.get_tensor(_key(item.storage_index)))
                    planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True


def _key(index: MetadataIndex) -> str:
    """Name of a box within its file: blocks.0.moe.experts.up/weight@4,0,0"""
    return f"{index.fqn}@{','.join(str(o) for o in index.offset or ())}"


def _resolve(planner: SavePlanner, item: WriteItem) -> Tensor:
    tensor = planner.resolve_data(item)
    assert isinstance(tensor, Tensor), f"{item.index.fqn} is no tensor; put it into the document"
    return tensor


def _bins(items: list[WriteItem]) -> Iterator[list[WriteItem]]:
    """Items in order, cut so that each file stays near FILE_BYTES."""
    held: list[WriteItem] = []
    size = 0
    for item in items:
        assert item.tensor_data is not None, f"{item.index.fqn} is no tensor; put it into the document"
        size += item.tensor_data.chunk.sizes.numel() * item.tensor_data.properties.dtype.itemsize
        held.append(item)
        if size >= FILE_BYTES:
            yield held
            held, size = [], 0
    if held:
        yield held


def _sync(path: Path) -> int:
    """Flush a file to the disk; returns its size in bytes."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_size


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
