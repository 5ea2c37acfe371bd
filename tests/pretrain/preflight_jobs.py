"""What single ranks do in the tests of the preflight: many preflights within one start of the ranks, each with a fault
planted in some of them."""

from __future__ import annotations

import importlib.metadata
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from configs.run import RunConfig
from parallel import groups, probe
from pretrain import gate, preflight_machine
from pretrain.build import make_topology
from pretrain.parity_ranks import Figures, run_layout, write_seed_checkpoint
from pretrain.preflight import preflight_on_ranks
from pretrain.preflight_report import Report
from slurm.environ import LaunchEnv
from tests.parallel.gate_jobs import experts_counted_twice, join

Patch = pytest.MonkeyPatch


@dataclass(frozen=True)
class Case:
    """One preflight.

    Attributes:
        config: of all ranks, but for those in `others`.
        fault: one of FAULTS, planted in `where`.
    """

    config: RunConfig
    fault: str = ""
    where: tuple[int, ...] = ()
    others: tuple[tuple[int, RunConfig], ...] = ()
    path: str = ""  # what the fault needs
    quick: bool = True


def wrong_sums(patch: Patch, path: str) -> None:
    original = probe.exchange

    def changed(operation: str, links: Any, sent: torch.Tensor, out: torch.Tensor) -> None:
        original(operation, links, sent, out)
        if operation == probe.ALL_REDUCE:
            out[0] = float("nan")

    patch.setattr(probe, "exchange", changed)


def slow_links(patch: Patch, path: str) -> None:
    original = probe.exchange

    def changed(operation: str, links: Any, sent: torch.Tensor, out: torch.Tensor) -> None:
        time.sleep(0.05)
        original(operation, links, sent, out)

    patch.setattr(probe, "exchange", changed)


def stale_lock(patch: Patch, path: str) -> None:
    patch.setenv("TORCH_EXTENSIONS_DIR", path)


def left_buffers(patch: Patch, path: str) -> None:
    patch.setattr(preflight_machine, "SHARED_MEMORY", Path(path))


def clock_ahead(patch: Patch, path: str) -> None:
    ahead = SimpleNamespace(time=lambda: time.time() + 5)
    patch.setattr(preflight_machine, "time", ahead)


def other_code(patch: Patch, path: str) -> None:
    patch.setattr(preflight_machine, "ROOMS", preflight_machine.ROOMS[:-1])


def other_torch(patch: Patch, path: str) -> None:
    original = importlib.metadata.version
    patch.setattr(importlib.metadata, "version", lambda name: "2.99.0" if name == "torch" else original(name))


def few_files(patch: Patch, path: str) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    patch.setattr(resource, "getrlimit", lambda which: (200, hard))  # lowered for good, it would starve later cases


def tampered_training(patch: Patch, path: str) -> None:
    patch.setattr(gate, "run_layout", lambda *args: run_layout(*args, tamper=experts_counted_twice))


FAULTS: dict[str, Callable[[Patch, str], None]] = {
    fault.__name__: fault
    for fault in (
        wrong_sums,
        slow_links,
        stale_lock,
        left_buffers,
        clock_ahead,
        other_code,
        other_torch,
        few_files,
        tampered_training,
    )
}


def cases_job(env: LaunchEnv, cases: list[Case]) -> list[Report]:
    """The same ranks look one case after the other."""
    device, reports = join(env), []
    for case in cases:
        config = dict(case.others).get(env.rank, case.config)
        topology = make_topology(case.config, env)
        with pytest.MonkeyPatch.context() as patch:
            if case.fault and env.rank in case.where:
                FAULTS[case.fault](patch, case.path)
            reports.append(preflight_on_ranks(config, topology, device, env.local_world_size, quick=case.quick))
    groups.stop()
    return reports


def before_and_after_job(env: LaunchEnv, config: RunConfig, scratch: str) -> tuple[Figures, Report, Figures]:
    """The same training before and after a preflight."""
    device, topology = join(env), make_topology(config, env)
    seed = Path(scratch) / f"seed-{env.rank}"
    write_seed_checkpoint(config, seed)
    before = run_layout(config, topology, device, str(seed), 2)
    report = preflight_on_ranks(config, topology, device, env.local_world_size)
    after = run_layout(config, topology, device, str(seed), 2)
    groups.stop()
    return before, report, after
