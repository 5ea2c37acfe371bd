"""THE table: which parameters are cut over which axis, and along which dimension.

Applied to a model on the meta device, it leaves each rank the slices it owns and says where they lie in the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import nn

from parallel.topology import Topology

# (parameter name, axis of the topology, dimension of the tensor); what no row names is replicated.
SHARDING: tuple[tuple[str, str, int], ...] = (("*.experts.*", "expert", 0),)


@dataclass(frozen=True)
class Placement:
    """Where a rank's part of a parameter lies in the whole tensor."""

    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    axis: str | None  # the axis it is cut over


def placement(name: str, shape: tuple[int, ...], topology: Topology) -> tuple[Placement, tuple[int, ...]]:
    """The placement of a parameter of whole shape `shape` on this rank, and the shape of its part."""
    offset, part = [0] * len(shape), list(shape)
    for pattern, axis, dim in SHARDING:
        degree = getattr(topology, axis)
        if fnmatch(name, pattern) and degree > 1:
            part[dim] //= degree
            offset[dim] = part[dim] * getattr(topology, f"{axis}_rank")
            return Placement(shape, tuple(offset), axis), tuple(part)
    return Placement(shape, tuple(offset), None), shape


def cut(model: nn.Module, topology: Topology) -> dict[str, Placement]:
    """Replace each parameter of a meta-device model by this rank's part; returns the placements by name."""
    placements = {}
    for name, parameter in list(model.named_parameters()):
        placed, part = placement(name, tuple(parameter.shape), topology)
        placements[name] = placed
        if part != tuple(parameter.shape):
            owner_name, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner_name), leaf, nn.Parameter(torch.empty(part, device="meta")))
    return placements
