"""Small agreements between all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs.errors import UserError


def rank_and_world() -> tuple[int, int]:
    """This rank and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up on any rank; every rank gets the same answer."""
    if not dist.is_initialized():
        return flag
    value = torch.tensor(int(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def sum_over_ranks(values: Tensor) -> Tensor:
    """Element-wise sum over all ranks."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def same_on_all_ranks(value: Any) -> Any:
    """Rank 0's value, on every rank. The value must be picklable; it never touches a disk."""
    if not dist.is_initialized():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def raise_together(error: UserError | None) -> None:
    """If any rank met a UserError, every rank raises one (the lowest rank's), so that none is left waiting."""
    if first := next((met for met in gather_on_all(error) if met), None):
        raise first


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def gather_on_first(value: Any) -> list[Any] | None:
    """Every rank's value, on rank 0; None elsewhere. Values must be picklable; they never touch a disk."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, found, dst=0)
    return found


def gather_on_all(value: Any) -> list[Any]:
    """Every rank's value, on every rank."""
    if not dist.is_initialized():
        return [value]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def scatter_from_first(values: list[Any] | None) -> Any:
    """This rank's of the values that rank 0 gives, one for each rank. Picklable; they never touch a disk."""
    if not dist.is_initialized():
        assert values is not None
        return values[0]
    box: list[Any] = [None]
    dist.scatter_object_list(box, values if dist.get_rank() == 0 else None, src=0)
    return box[0]
