"""A flat piece of a row-major tensor as boxes of the whole tensor.

ZeRO cuts a parameter (itself perhaps a slice of a larger tensor) anywhere in its flattened order. A checkpoint that
any layout can read wants boxes: offset and size along each dimension. A flat range is at most 2n - 1 boxes of an
n-dimensional tensor: the rest of a row, whole rows, the start of a row, and so in each dimension.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from parallel.sharding import Placement


@dataclass(frozen=True)
class Box:
    """A box of the whole tensor and the values in it (a view)."""

    offset: tuple[int, ...]
    values: Tensor


class TensorBoxes:
    """One rank's boxes of a tensor, which torch.distributed.checkpoint plans for as for any sharded tensor."""

    def __init__(self, global_shape: tuple[int, ...], boxes: list[Box]) -> None:
        self.global_shape, self.boxes = torch.Size(global_shape), boxes

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        """What the default save planner asks a sharded tensor for."""
        properties = TensorProperties(dtype=self.boxes[0].values.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size(box.offset)),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=_chunk(box), properties=properties, size=self.global_shape),
            )
            for box in self.boxes
        ]

    def chunks(self) -> list[ChunkStorageMetadata]:
        return [_chunk(box) for box in self.boxes]

    def values_at(self, index: MetadataIndex) -> Tensor:
        """The values of the box that begins at the offset of `index`."""
        return next(box.values for box in self.boxes if box.offset == tuple(index.offset or ()))


def fragment_boxes(flat: Tensor, start: int, part_shape: tuple[int, ...], placed: Placement) -> TensorBoxes:
    """Boxes for the elements [start, start + len(flat)) of a flattened part of shape `part_shape`.

    Args:
        flat: the values, one-dimensional; the boxes are views of it.
        placed: where the part lies in the whole tensor.
    """
    boxes = []
    for position, offset, shape in flat_range_boxes(start, flat.numel(), part_shape):
        values = flat.narrow(0, position - start, math.prod(shape)).view(shape)
        boxes.append(Box(tuple(a + b for a, b in zip(offset, placed.offset)), values))
    return TensorBoxes(placed.global_shape, boxes)


def flat_range_boxes(
    start: int, count: int, shape: tuple[int, ...]
) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """(flat position, offset, shape) of boxes that together are the range [start, start + count), in order."""
    if count == 0:
        return
    if len(shape) == 1:
        yield start, (start,), (count,)
        return
    row = math.prod(shape[1:])
    end = start + count
    while start < end:
        index, within = divmod(start, row)
        if within == 0 and end - start >= row:  # whole rows
            rows = (end - start) // row
            yield start, (index, *([0] * (len(shape) - 1))), (rows, *shape[1:])
            start += rows * row
        else:  # a part of one row
            taken = min(end - start, row - within)
            for position, offset, inner in flat_range_boxes(within, taken, shape[1:]):
                yield index * row + position, (index, *offset), (1, *inner)
            start += taken


def _chunk(box: Box) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(box.offset), sizes=box.values.shape)
