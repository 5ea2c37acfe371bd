"""THE table: which parameters are cut over which axis, and along which dimension.

Applied to a model on the meta device, it leaves each rank the slices it owns and says where they lie in the whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatch

import torch
from torch import nn

from parallel.topology import Topology

# (parameter name, axis of the topology, dimension of the tensor); what no row names is replicated. A name may stand in
# several rows. Tensor parallelism: Megatron-LM, arXiv:1909.08053, sec. 3 (rows of the first weight of a pair, columns
# of the second); a linear weight is [out, in].
SHARDING: tuple[tuple[str, str, int], ...] = (
    ("embed.weight", "tensor", 0),
    ("head.weight", "tensor", 0),
    ("*.attention.query.weight", "tensor", 0),
    ("*.attention.key.weight", "tensor", 0),
    ("*.attention.value.weight", "tensor", 0),
    ("*.attention.bias.table", "tensor", 0),
    ("*.attention.out.weight", "tensor", 1),
    ("*.ffn.gate_proj.weight", "tensor", 0),
    ("*.ffn.in_proj.weight", "tensor", 0),
    ("*.ffn.out_proj.weight", "tensor", 1),
    ("*.experts.*", "expert", 0),
    ("*.experts.gate", "expert_width", 1),
    ("*.experts.up", "expert_width", 1),
    ("*.experts.down", "expert_width", 2),
)

# Replicated over tensor ranks, yet each of those sees only its own tokens or heads: the gradient is the sum of theirs.
SEES_OWN_HEADS = ("*.attention.query_norm.scale", "*.attention.key_norm.scale")
SEES_OWN_TOKENS = ("*attention_norm.scale", "*ffn_norm.scale", "norm.scale")  # where the sequence is split
SEES_OWN_ROUTES = ("*.router.*",)  # each tensor rank routes its own tokens, or holds a part of each expert's answer


@dataclass(frozen=True)
class Placement:
    """Where a rank's part of a parameter lies in the whole tensor."""

    global_shape: tuple[int, ...]
    offset: tuple[int, ...]
    axes: tuple[str, ...] = ()  # the axes it is cut over
    sum_over_tensor: bool = False  # replicated over tensor ranks, each of which has a part of the gradient only
    is_expert: bool = False


def placement(name: str, shape: tuple[int, ...], topology: Topology) -> tuple[Placement, tuple[int, ...]]:
    """The placement of a parameter of whole shape `shape` on this rank, and the shape of its part."""
    offset, part, axes = [0] * len(shape), list(shape), []
    for pattern, axis, dim in SHARDING:
        degree = getattr(topology, axis)
        if degree > 1 and fnmatch(name, pattern):
            part[dim] //= degree
            offset[dim] = part[dim] * getattr(topology, f"{axis}_rank")
            axes.append(axis)
    partial, is_expert = _sum_over_tensor(name, topology), fnmatch(name, "*.experts.*")
    return Placement(shape, tuple(offset), tuple(axes), partial, is_expert), tuple(part)


def _sum_over_tensor(name: str, topology: Topology) -> bool:
    if topology.tensor == 1:
        return False
    patterns = SEES_OWN_HEADS + SEES_OWN_ROUTES + (SEES_OWN_TOKENS if topology.sequence else ())
    return any(fnmatch(name, pattern) for pattern in patterns)


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
