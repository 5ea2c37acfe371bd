"""Small agreements between all ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs.errors import UserError


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
    if not dist.is_initialized():
        if error:
            raise error
        return
    found: list[tuple[str, str, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (error.found, error.expected, error.remedy) if error else None)
    if first := next((parts for parts in found if parts), None):
        raise UserError(*first)


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
