"""Who writes which boxes of a checkpoint: replicas once, spread evenly over the ranks that hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from parallel import collectives
from parallel.checkpoint_manifest import StoredTensor
from parallel.fragments import TensorBoxes

Tensors = Mapping[str, Tensor | TensorBoxes]
Place = tuple[str, tuple[int, ...], tuple[int, ...]]  # name of a tensor, offset and shape of a box of it


@dataclass(frozen=True)
class Plan:
    """Who writes which boxes. The same for every save of one engine, so that it is made once."""

    mine: list[Place]
    everyone: list[list[Place]]  # of each rank; on rank 0 only
    described: dict[str, tuple[tuple[int, ...], str]]  # name -> shape and dtype; on rank 0 only
    total_bytes: int  # of all ranks, without heads of files and the manifest


def make_plan(tensors: Tensors) -> Plan:
    """All ranks call it together. Replicated boxes, and plain tensors that several ranks hold, get one writer.

    Raises:
        ValueError: the boxes of all ranks overlap, or leave a part of a tensor out.
    """
    gathered = collectives.gather_on_first(local_plan(tensors))
    told: list[tuple[list[Place] | ValueError, int]] | None = None
    everyone: list[list[Place]] = []
    described: dict[str, tuple[tuple[int, ...], str]] = {}
    if gathered is not None:
        try:
            everyone, described = spread(gathered)
            total = sum(StoredTensor(shape, dtype, ()).num_bytes for shape, dtype in described.values())
            told = [(places, total) for places in everyone]
        except ValueError as error:
            told = [(error, 0)] * len(gathered)
    mine, total_bytes = collectives.scatter_from_first(told)
    if isinstance(mine, ValueError):
        raise mine
    return Plan(mine, everyone, described, total_bytes)


def bytes_to_write(tensors: Tensors, plan: Plan) -> int:
    """What this rank writes."""
    held = ((tensors[name], shape) for name, _, shape in plan.mine)
    return sum(math.prod(shape) * _item_bytes(tensor) for tensor, shape in held)


def _item_bytes(held: Tensor | TensorBoxes) -> int:
    return (held.boxes[0].values if isinstance(held, TensorBoxes) else held).element_size()


def local_plan(tensors: Tensors) -> SavePlan:
    """What this rank could write."""
    planner = _Planner()
    planner.set_up_planner(dict(tensors), is_coordinator=True)
    return planner.create_local_plan()


def spread(plans: list[SavePlan]) -> tuple[list[list[Place]], dict[str, tuple[tuple[int, ...], str]]]:
    """What each rank is to write, and shape and dtype of each tensor."""
    chosen, metadata = _Planner().create_global_plan(plans)
    described: dict[str, tuple[tuple[int, ...], str]] = {}
    for name, stored in metadata.state_dict_metadata.items():
        assert isinstance(stored, TensorStorageMetadata)
        described[name] = (tuple(stored.size), str(stored.properties.dtype).removeprefix("torch."))
    return [[_place(item) for item in plan.items] for plan in chosen], described


def _place(item: WriteItem) -> Place:
    assert item.tensor_data is not None, f"{item.index.fqn} is no tensor; put it into the document"
    chunk = item.tensor_data.chunk
    return item.index.fqn, tuple(chunk.offsets), tuple(chunk.sizes)


class _Planner(DefaultSavePlanner):
    """The default, told not to take apart what it was given."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
