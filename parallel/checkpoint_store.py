"""Saving and loading one checkpoint folder over all ranks; the format is `checkpoint_manifest.py`'s.

torch.distributed.checkpoint decides who writes what and which stored boxes make up a wanted one; its own storage is
not used: its index is a pickle, it keeps no checksums, its asynchronous save runs collectives in a thread, and its
cache of plans outlives the engine they were made for.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from configs.errors import UserError
from parallel import collectives
from parallel.checkpoint_files import BoxReader
from parallel.checkpoint_manifest import Damaged, Manifest, StoredTensor, remedy_for
from parallel.checkpoint_plan import Tensors, make_plan
from parallel.checkpoint_write import Write, write_refused
from parallel.fragments import TensorBoxes
from parallel.mailbox import Mailbox


def save(folder: Path, tensors: Tensors, document: dict[str, Any]) -> None:
    """Write a checkpoint and return once it is whole; all ranks call it together.

    Args:
        folder: an empty or absent folder, seen by all ranks.
        document: what else a resume needs, as JSON values; rank 0's is kept.
    """
    error = None
    try:
        if collectives.rank_and_world()[0] == 0:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as met:
        error = write_refused(met, folder)
    collectives.raise_together(error)
    write = Write(make_plan(tensors), folder, tensors, document, Mailbox(f"checkpoint/{folder}"))
    write.run()
    collectives.raise_together(write.error if isinstance(write.error, UserError) else None)
    write.raise_error()


def load(folder: Path, tensors: Tensors, manifest: Manifest | None = None) -> int:
    """Fill `tensors` in place from a checkpoint of any layout; each rank on its own. Returns the bytes that were read
    into them.

    Raises:
        UserError: the checkpoint lacks a tensor, or holds one of another shape.
    """
    manifest = manifest or Manifest.read(folder)
    filled = 0
    with BoxReader(folder, manifest) as reader:
        for name, wanted in tensors.items():
            stored = _stored(folder, manifest, name, wanted)
            filled += read_boxes(reader, name, stored, _targets(wanted))
    return filled


def read_boxes(
    reader: BoxReader, name: str, stored: StoredTensor, wanted: Sequence[tuple[tuple[int, ...], Tensor]]
) -> int:
    """Fill boxes of a whole tensor, each (offset, values), from the stored boxes they overlap; returns their bytes."""
    places = {box.offset: box for box in stored.boxes}
    metadata = TensorStorageMetadata(
        TensorProperties(dtype=getattr(torch, stored.dtype)),
        torch.Size(stored.shape),
        [ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.shape)) for box in stored.boxes],
    )
    targets, filled = dict(wanted), 0
    chunks = [ChunkStorageMetadata(torch.Size(offset), values.shape) for offset, values in wanted]
    for item in create_read_items_for_chunk_list(name, metadata, chunks):
        target = targets[tuple(item.dest_index.offset or ())]
        for dim, (start, length) in enumerate(zip(item.dest_offsets, item.lengths)):
            target = target.narrow(dim, start, length)
        reader.read(stored.dtype, places[tuple(item.storage_index.offset or ())], item.storage_offsets, target)
        filled += target.nbytes
    if filled != sum(values.nbytes for _, values in wanted):
        raise Damaged(f"{reader.folder} holds only a part of {name}", "all of it", remedy_for(reader.folder))
    return filled


def _stored(folder: Path, manifest: Manifest, name: str, wanted: Tensor | TensorBoxes) -> StoredTensor:
    shape = tuple(wanted.global_shape if isinstance(wanted, TensorBoxes) else wanted.shape)
    stored = manifest.tensors.get(name)
    if stored is None or stored.shape != shape:
        there = "nothing of that name" if stored is None else f"{list(stored.shape)}"
        found = f"{folder} holds {there} for {name}"
        raise UserError(found, f"a tensor of shape {list(shape)}", "choose a checkpoint of the same model")
    return stored


def _targets(wanted: Tensor | TensorBoxes) -> Sequence[tuple[tuple[int, ...], Tensor]]:
    if isinstance(wanted, TensorBoxes):
        return [(box.offset, box.values.detach()) for box in wanted.boxes]
    return [((0,) * wanted.ndim, wanted.detach())]
