"""Messages between ranks beside all process groups: for threads, which must not take part in collectives."""

from __future__ import annotations

import pickle
import time
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

from parallel.collectives import rank_and_world

POLL_S = 0.02


class Mailbox:
    """Every rank sends one message a topic; rank 0 reads all. Over the store the ranks met at, by a connection of its
    own; used by one thread at a time. Without ranks, messages stay here."""

    def __init__(self, name: str) -> None:
        self._name, self._kept = name, dict[str, bytes]()
        self.rank, self.world_size = rank_and_world()
        self._store: Any = None
        if self.world_size > 1:
            store = distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
            self._store = dist.PrefixStore(name, store)  # type: ignore[attr-defined]

    def send(self, topic: str, message: Any) -> None:
        """The message must be picklable; it never touches a disk."""
        data = pickle.dumps(message)
        if self._store is None:
            self._kept[topic] = data
            return
        self._store.set(f"{topic}/{self.rank}", data)
        self._store.add(f"{topic}/count", 1)

    def collect(self, topic: str) -> list[Any]:
        """On rank 0: the message of every rank, in order, once all have come. That one never will is for
        `failures.Watch` to notice."""
        if self._store is None:
            return [pickle.loads(self._kept.pop(topic))]  # noqa: S301 (our own)
        pause = POLL_S / 10
        while self._store.add(f"{topic}/count", 0) < self.world_size:
            time.sleep(pause)
            pause = min(POLL_S, pause * 2)
        messages = []
        for rank in range(self.world_size):
            messages.append(pickle.loads(self._store.get(f"{topic}/{rank}")))  # noqa: S301 (our own ranks')
            self._store.delete_key(f"{topic}/{rank}")
        self._store.delete_key(f"{topic}/count")
        return messages
