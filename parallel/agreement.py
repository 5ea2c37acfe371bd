"""What ranks must agree on before they work together, said over the store they meet at; no process group yet."""

from __future__ import annotations

import json
import time
from typing import Any

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from configs.base import differences
from configs.errors import UserError


def agree_on(settings: dict[str, Any], fault: UserError | None, store: Store, rank: int, world_size: int) -> None:
    """Return on every rank, or raise the same UserError on every rank if one brings a fault, or other settings than
    rank 0.

    Args:
        settings: JSON values.
    """
    if world_size == 1:
        if fault:
            raise fault
        return
    store = PrefixStore("settings", store)
    if rank == 0:
        store.set("rank 0", json.dumps(settings))
    wanted = json.loads(store.get("rank 0"))
    mine = json.loads(json.dumps(settings))
    if differing := differences(mine, wanted):
        shown = "; ".join(f"{key} is {a!r}, on rank 0 {b!r}" for key, a, b in differing[:5])
        fault = UserError(
            f"rank {rank} has another configuration: {shown}",
            "the same configuration file and overrides on every rank",
            "start all ranks by one command, from one copy of the file",
        )
    if fault:
        store.compare_set("fault", "", json.dumps([fault.found, fault.expected, fault.remedy]))
    # The last to arrive tells all; a rank that failed to arrive ends the wait by its time-out.
    if store.add("arrived", 1) == world_size:
        store.set("verdict", store.get("fault").decode() if store.check(["fault"]) else "")
    if verdict := store.get("verdict").decode():
        heard, deadline = store.add("heard", 1), time.monotonic() + 5
        while rank == 0 and heard < world_size and time.monotonic() < deadline:  # the store ends with this rank
            time.sleep(0.05)
            heard = store.add("heard", 0)
        raise UserError(*json.loads(verdict))
