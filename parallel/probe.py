"""Do the links between ranks carry what is sent, and how fast: each kind of group of a layout, tried.

Bus bandwidths are nccl-tests' (doc/PERFORMANCE.md there): bytes / seconds x 2(n-1)/n of an all-reduce over n ranks,
(n-1)/n of an all-to-all, 1 of a message. They compare to a link's peak, whatever n is.
"""

from __future__ import annotations

import re
import statistics
import time
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from parallel import collectives
from parallel.topology import Topology

ALL_REDUCE, ALL_TO_ALL, MESSAGE = "all-reduce", "all-to-all", "send and receive"
Links = Any  # ProcessGroupGloo or ProcessGroupNCCL, of which torch's stubs know no collective
_TRIES = 4
SLOW = 0.5  # of the other groups' median


@dataclass(frozen=True)
class Size:
    """How much is sent to find out."""

    num_bytes: int
    repetitions: int
    timeout_s: float = 60.0


@dataclass(frozen=True)
class Kind:
    """Groups of ranks that are used alike. A rank is in one of them at most, so that all work at the same time."""

    name: str
    operation: str
    groups: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Measured:
    """One group.

    Attributes:
        seconds: of the best repetition, as cores and links may be shared with others.
        fault: what was wrong, with the ranks that noticed; empty where nothing was.
        ratio: bus bandwidth / median of the other groups of its kind, tried at the same time.
    """

    kind: str
    operation: str
    ranks: tuple[int, ...]
    num_bytes: int
    seconds: float
    fault: str = ""
    ratio: float = 1.0

    @property
    def is_slow(self) -> bool:
        return not self.fault and self.ratio < SLOW

    @property
    def bus_bandwidth(self) -> float:
        """Bytes a second."""
        n = len(self.ranks)
        factor = {ALL_REDUCE: 2 * (n - 1) / n, ALL_TO_ALL: (n - 1) / n, MESSAGE: 1.0}[self.operation]
        return self.num_bytes / self.seconds * factor


@dataclass(frozen=True)
class _Trace:
    """What one rank saw of its group."""

    seconds: tuple[float, ...] = ()
    fault: str = ""


def kinds_of(topology: Topology, tied_ends: bool = False, has_experts: bool = True) -> list[Kind]:
    """The kinds of groups a layout trains with; those over the very same ranks by the same operation are one."""
    t, last = topology, topology.pipeline - 1
    found = [Kind("world", ALL_REDUCE, (tuple(range(t.world_size)),))] if t.world_size > 1 else []
    if t.tensor > 1:
        found.append(Kind("tensor", ALL_REDUCE, _tuples(t.tensor_groups())))
    if t.context > 1:
        found.append(Kind("context", ALL_TO_ALL, _tuples(t.context_groups())))
    if t.lanes > 1:
        found.append(Kind("data" if t.context == 1 else "data x context", ALL_REDUCE, _tuples(t.lane_groups())))
    if has_experts and t.expert > 1:
        found.append(Kind("expert", ALL_TO_ALL, _tuples(t.expert_groups())))
    replicas = _tuples(t.expert_data_groups())
    if has_experts and t.experts_have_groups and len(replicas[0]) > 1:
        found.append(Kind("expert replicas", ALL_REDUCE, replicas))
    for parity in range(min(2, last)):  # a rank in the middle has two neighbours: one at a time
        stages = range(parity, last, 2)
        pairs = tuple(
            (stage * t.ranks_per_stage + place, (stage + 1) * t.ranks_per_stage + place)
            for stage in stages
            for place in range(t.ranks_per_stage)
        )
        found.append(Kind("pipeline", MESSAGE, pairs))
    if tied_ends and last > 0:
        found.append(Kind("tied embedding", ALL_REDUCE, _tuples(t.end_groups())))
    merged: dict[tuple[str, tuple[tuple[int, ...], ...]], Kind] = {}
    for kind in found:
        key = (kind.operation, kind.groups)
        merged[key] = replace(kind, name=f"{merged[key].name}, {kind.name}") if key in merged else kind
    return list(merged.values())


def measure(kinds: list[Kind], device: torch.device, size: Size) -> list[Measured]:
    """Try every group; all ranks call it together, and get the same. A kind with a group that seems slow is tried
    again: a core may have been busy elsewhere."""
    token = collectives.same_on_all_ranks(f"{time.time_ns():x}")
    return [one for number, kind in enumerate(kinds) for one in _measured(kind, device, size, f"{token}/{number}")]


def _measured(kind: Kind, device: torch.device, size: Size, token: str) -> list[Measured]:
    """The best of each group, of as many tries as it takes until none seems slow."""
    best = compared(_measure(kind, device, size, f"probe/{token}/0"))
    for number in range(1, _TRIES):
        if any(one.is_slow for one in best):
            again = compared(_measure(kind, device, size, f"probe/{token}/{number}"))
            best = [_better(first, second) for first, second in zip(best, again)]
    return best


def compared(found: list[Measured]) -> list[Measured]:
    """Groups of one kind, each with its `ratio` to the others."""
    speeds = [None if one.fault else one.bus_bandwidth for one in found]
    result = []
    for place, (one, speed) in enumerate(zip(found, speeds)):
        others = [other for there, other in enumerate(speeds) if there != place and other is not None]
        result.append(replace(one, ratio=speed / statistics.median(others)) if others and speed is not None else one)
    return result


def backend_name() -> str:
    """The library that carries collectives."""
    return str(dist.get_backend()) if dist.is_initialized() else "none"


def _better(first: Measured, second: Measured) -> Measured:
    if first.fault or second.fault:
        return first if first.fault else second
    return replace(first, seconds=min(first.seconds, second.seconds), ratio=max(first.ratio, second.ratio))


def _measure(kind: Kind, device: torch.device, size: Size, token: str) -> list[Measured]:
    rank = dist.get_rank()
    mine = next((ranks for ranks in kind.groups if rank in ranks), None)
    trace = _Trace()
    if mine is not None:
        try:
            links = _join(mine, device, size.timeout_s, f"{token}/{kind.name}/{kind.operation}/{mine[0]}")
            try:
                trace = _try(kind.operation, links, device, size)
            finally:
                links.shutdown()
        except (RuntimeError, ValueError) as error:
            trace = _Trace(fault=f"failed: {_one_line(error)}")
    traces: list[_Trace] = collectives.gather_on_all(trace)
    return [_merge(kind, ranks, [traces[there] for there in ranks], size) for ranks in kind.groups]


def _join(ranks: tuple[int, ...], device: torch.device, timeout_s: float, name: str) -> Links:
    """A group of these ranks beside all that torch keeps account of: made by its members alone, where
    `dist.new_group` has all ranks wait at each of a thousand groups (or, made locally, names a group by its ranks, and
    finds the addresses of the last one that had the same)."""
    store = dist.PrefixStore(name, distributed_c10d._get_default_store())  # type: ignore[attr-defined]
    place, timeout = ranks.index(dist.get_rank()), timedelta(seconds=timeout_s)
    if device.type != "cuda":
        return dist.ProcessGroupGloo(store, place, len(ranks), timeout)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return dist.ProcessGroupNCCL(store, place, len(ranks), options)


def _merge(kind: Kind, ranks: tuple[int, ...], traces: list[_Trace], size: Size) -> Measured:
    """Of a repetition, the rank that came last saw how long it took; the others saw how long they waited, too."""
    told: dict[str, list[int]] = {}
    for rank, trace in zip(ranks, traces):
        if trace.fault:
            told.setdefault(trace.fault, []).append(rank)
    if told:
        fault = "; ".join(f"rank(s) {' '.join(map(str, where))}: {text}" for text, where in told.items())
        return Measured(kind.name, kind.operation, ranks, size.num_bytes, float("inf"), fault)
    seconds = min(min(repetition) for repetition in zip(*(trace.seconds for trace in traces)))
    return Measured(kind.name, kind.operation, ranks, size.num_bytes, max(seconds, 1e-9))


def _try(operation: str, links: Links, device: torch.device, size: Size) -> _Trace:
    """The first time makes connections and is not counted; what arrives is looked at every time."""
    place, n = links.rank(), links.size()
    length = max(1, size.num_bytes // 4 // n) * n
    sent, wanted = _pattern(operation, place, n, length)
    sent, wanted, out = sent.to(device), wanted.to(device), torch.empty(length, device=device)
    seconds, fault = [], ""
    for _ in range(size.repetitions + 1):
        out.copy_(sent if operation == ALL_REDUCE else torch.zeros_like(sent))
        _finish(device)
        began = time.perf_counter()
        exchange(operation, links, sent, out)
        _finish(device)
        seconds.append((time.perf_counter() - began) / (2 if operation == MESSAGE else 1))
        fault = fault or _difference(out, wanted)  # and on, as the others count on this rank
    return _Trace(tuple(seconds[1:]), f"{operation} gave wrong values: {fault}" if fault else "")


def exchange(operation: str, links: Links, sent: Tensor, out: Tensor) -> None:
    """Once. An all-reduce works in `out`, which holds what is sent; a message goes there and comes back."""
    if operation == ALL_REDUCE:
        links.allreduce([out]).wait()
    elif operation == ALL_TO_ALL:
        links.alltoall_base(out, sent, [], []).wait()
    else:
        for sends in (links.rank() == 0, links.rank() == 1):
            other = 1 - links.rank()
            (links.send([sent], other, 0) if sends else links.recv([out], other, 0)).wait()


def _pattern(operation: str, place: int, n: int, length: int) -> tuple[Tensor, Tensor]:
    """What this rank sends, and what must arrive: whole numbers that float32 holds, others of each rank and place."""
    ramp = (torch.arange(length) % 7 + 1).float()
    if operation == ALL_REDUCE:
        weights = [there % 61 + 1 for there in range(n)]
        return ramp * weights[place], ramp * sum(weights)
    if operation == MESSAGE:
        return ramp * (place + 1), ramp * (2 - place)
    ramp = ramp[: length // n].repeat(n)
    part = torch.arange(n).repeat_interleave(length // n)  # the rank a part goes to, or comes from
    return ramp + (place * n + part) % 2**20 * 8, ramp + (part * n + place) % 2**20 * 8


def _difference(out: Tensor, wanted: Tensor) -> str:
    if torch.equal(out, wanted):
        return ""
    wrong = (out != wanted).nonzero().flatten()
    first = int(wrong[0])
    return (
        f"{len(wrong):,} of {len(out):,}, the first at {first:,}: {float(out[first]):g} in place of "
        f"{float(wanted[first]):g}"
    )


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _tuples(groups: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(ranks) for ranks in groups)


def _one_line(error: BaseException) -> str:
    text = re.sub(r"\[/[^]]*\] ", "", str(error)).strip()  # gloo begins with a path of the machine it was built on
    return f"{type(error).__name__}: {text.splitlines()[0] if text else ''}"[:200]
