"""What ranks must agree on before they work together, said over the store they meet at; no process group yet."""

from __future__ import annotations

import json
from typing import Any

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from configs.base import differences
from configs.errors import UserError


def agree_on(settings: dict[str, Any], store: Store, rank: int, world_size: int) -> None:
    """Return on every rank, or raise the same UserError on every rank if one brings other settings than rank 0.

    Args:
        settings: JSON values.
    """
    if world_size == 1:
        return
    store = PrefixStore("settings", store)
    if rank == 0:
        store.set("rank 0", json.dumps(settings))
    wanted = json.loads(store.get("rank 0"))
    mine = json.loads(json.dumps(settings))
    if differing := differences(mine, wanted):
        shown = "; ".join(f"{key} is {a!r}, on rank 0 {b!r}" for key, a, b in differing[:5])
        store.compare_set("fault", "", f"rank {rank} has another configuration: {shown}")
    # The last to arrive tells all; a rank that failed to arrive ends the wait by its time-out.
    if store.add("arrived", 1) == world_size:
        store.set("verdict", store.get("fault").decode() if store.check(["fault"]) else "")
    if fault := store.get("verdict").decode():
        raise UserError(
            fault,
            "the same configuration file and overrides on every rank",
            "start all ranks by one command, from one copy of the file",
        )
