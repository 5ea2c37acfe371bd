"""Preflight: what speaks against a run, found before its first step. `glam preflight`, and the trainer at a new run.

Each check looks on every rank, cheap ones first; rank 0 judges what all saw. None ends the others, so that one report
tells all.
"""

from __future__ import annotations

import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from configs.run import RunConfig
from parallel import collectives, probe
from parallel.topology import Topology
from pretrain import gate
from pretrain.parity import TOLERANCE, Verdict
from pretrain.preflight_data import DATA_STEPS
from pretrain.preflight_disk import DISK_STEPS
from pretrain.preflight_machine import MACHINE_STEPS
from pretrain.preflight_report import Check, Report, Step, Where, gib, spans
from pretrain.trials import layout_of, make_trials

_FULL_BYTES, _QUICK_BYTES = {"cuda": 64 * 2**20, "cpu": 4 * 2**20}, {"cuda": 8 * 2**20, "cpu": 2**18}


def preflight_on_ranks(
    config: RunConfig,
    topology: Topology,
    device: torch.device,
    local_world_size: int = 1,
    quick: bool = False,
    ranks_meant: int | None = None,
    progress: Callable[[list[Check]], None] = lambda checks: None,
) -> Report:
    """Every check, on ranks that have met and have made no groups yet; all call it together and get the same report.

    Nothing is left behind: groups are taken down, files removed, and what a run draws at random is seeded later.

    Args:
        topology: of these ranks.
        quick: smaller samples, and no parity step: seconds.
        ranks_meant: as many as the run is meant for, where these are fewer.
        progress: on rank 0, told the answers as they come.
    """
    began = time.perf_counter()
    hosts = tuple(collectives.gather_on_all(socket.gethostname()))
    where = Where(config, topology, device, local_world_size, ranks_meant or len(hosts), quick, hosts)
    checks, seconds = list[Check](), dict[str, float]()
    for step in QUICK_STEPS if quick else STEPS:
        looked = time.perf_counter()
        found = _take(step, where)
        seconds[step.name] = time.perf_counter() - looked
        if where.rank == 0:
            progress(found)
        checks += found
    layout = layout_of(topology) if not where.layout_faults else f"{len(hosts)} ranks"
    took = time.perf_counter() - began
    report: Report = collectives.same_on_all_ranks(
        Report(config.name, layout, len(hosts), tuple(checks), took, seconds)
    )
    return report


@dataclass(frozen=True)
class _Failed:
    """A look that ended in an error."""

    error: UserError


def _take(step: Step, where: Where) -> list[Check]:
    """Look on every rank; on rank 0, judge."""
    seen: Any
    try:
        seen = step.look(where)
    except UserError as error:
        seen = _Failed(error)
    except OSError as error:
        seen = _Failed(UserError(str(error), "", "see what the system says of it"))
    found = collectives.gather_on_first(seen)
    if found is None:
        return []
    if failed := {rank: one.error for rank, one in enumerate(found) if isinstance(one, _Failed)}:
        first = next(iter(failed.values()))
        return [Check(step.name, "no", f"{first.found} ({where.place(failed)})", first.remedy)]
    return step.judge(where, found)


# ---- collectives ----------------------------------------------------------------------------------------------------
def look_at_links(where: Where) -> list[probe.Measured]:
    if where.num_ranks == 1:
        return []
    sizes = _QUICK_BYTES if where.quick else _FULL_BYTES
    size = probe.Size(sizes[where.device.type], repetitions=3 if where.quick else 5)
    model = where.config.model
    topology = where.topology
    kinds = probe.kinds_of(topology, model.tied_embedding, model.moe is not None)
    return probe.measure(kinds, where.device, size)


def judge_links(where: Where, found: list[list[probe.Measured]]) -> list[Check]:
    measured = found[0]  # the same on every rank
    kinds = dict.fromkeys(one.kind for one in measured)
    checks = [_judge_kind(where, kind, [one for one in measured if one.kind == kind]) for kind in kinds]
    if suspects := _suspects([one for one in measured if one.is_slow]):
        told = f"{where.place(suspects)}: in slow groups of several kinds"
        checks.append(Check("collectives: suspects", "warn", told, "look at its node first", {"ranks": suspects}))
    return checks or [Check("collectives", "left out", "one rank")]


def _judge_kind(where: Where, kind: str, measured: list[probe.Measured]) -> Check:
    name, first = f"collectives: {kind}", measured[0]
    numbers: dict[str, Any]
    what = f"{first.operation} of {gib(first.num_bytes)}, {len(measured)} group(s) of {len(first.ranks)}"
    if faults := [one for one in measured if one.fault]:
        told = "; ".join(f"group {spans(one.ranks)}: {one.fault}" for one in faults[:2])
        told += f"; and {len(faults) - 2} more" if len(faults) > 2 else ""
        remedy = f"see the network and devices of {where.place({rank for one in faults for rank in one.ranks})}"
        return Check(
            name, "no", f"{what}: {told}", remedy, {"faults": [[list(one.ranks), one.fault] for one in faults]}
        )
    speeds = [one.bus_bandwidth for one in measured]
    slowest, middle = min(measured, key=lambda one: one.bus_bandwidth), statistics.median(speeds)
    numbers = {
        "operation": first.operation,
        "bytes": first.num_bytes,
        "bus_bytes_per_s": middle,
        "slowest": {"ranks": list(slowest.ranks), "bus_bytes_per_s": slowest.bus_bandwidth},
    }
    told = f"{what}: {middle / 1e9:,.2f} GB/s"
    if len(measured) > 1:
        told += f", slowest {slowest.bus_bandwidth / 1e9:,.2f} (ranks {spans(slowest.ranks)})"
    if slow := [one for one in measured if one.is_slow]:
        said = ", ".join(f"ranks {spans(one.ranks)} at {one.ratio:.2f} of the others" for one in slow[:4])
        members = {rank for one in slow for rank in one.ranks}
        numbers["slow"] = [list(one.ranks) for one in slow]
        remedy = f"see links and load of {where.place(members)}, or leave the node out"
        return Check(name, "warn", f"{told}; slow: {said}", remedy, numbers)
    return Check(name, "ok", told, "", numbers)


def _suspects(slow: list[probe.Measured]) -> list[int]:
    """Ranks in slow groups of most kinds, where those are several: what slow groups have in common is to blame."""
    kinds: dict[int, set[str]] = {}
    for one in slow:
        for rank in one.ranks:
            kinds.setdefault(rank, set()).add(one.kind)
    most = max((len(names) for names in kinds.values()), default=0)
    return sorted(rank for rank, names in kinds.items() if len(names) == most) if most > 1 else []


# ---- parity ---------------------------------------------------------------------------------------------------------
def look_at_parity(where: Where) -> Verdict | str:
    """One step of a small model of the same kinds at this layout, against one process; or why none was taken."""
    config, topology = where.config, where.topology
    if where.layout_faults:
        return "the layout does not fit"
    if config.model.moe and config.model.moe.router.kind == "noisy_topk":
        return "routers of kind noisy_topk draw noise on each rank, so that no two layouts decide alike"
    [trial] = make_trials(config, [layout_of(topology)], 2, False, where.num_ranks)
    tolerance = TOLERANCE * (10 if where.device.type == "cuda" else 1)
    with tempfile.TemporaryDirectory(prefix="glam-preflight-") as scratch:
        return gate.try_on_ranks(trial, topology, where.device, Path(scratch), 1, tolerance)


def judge_parity(where: Where, found: list[Verdict | str]) -> list[Check]:
    verdict = found[0]
    if isinstance(verdict, str):
        return [Check("parity", "left out", verdict)]
    if not verdict.agrees:
        remedy = "glam parity CONFIG tells more; see versions and devices of the rank it names"
        told = f"{verdict.layout} departs from one process in the {verdict.departure}"
        return [Check("parity", "no", told, remedy, verdict.as_json())]
    worst = max(verdict.errors, key=lambda kind: verdict.errors[kind])
    told = f"{verdict.layout}, one step of a small model: as on one process to {verdict.errors[worst]:.0e} ({worst})"
    return [Check("parity", "ok", f"{told} {verdict.note}".strip(), "", verdict.as_json())]


QUICK_STEPS = (*MACHINE_STEPS, *DISK_STEPS, *DATA_STEPS, Step("collectives", look_at_links, judge_links))
STEPS = (*QUICK_STEPS, Step("parity", look_at_parity, judge_parity))
