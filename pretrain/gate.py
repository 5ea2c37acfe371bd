"""`glam parity` itself: starts ranks here, or uses those that were launched, and tells the verdicts."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from configs.run import RunConfig
from parallel import collectives, groups
from pretrain.build import make_topology
from pretrain.local_ranks import run_ranks
from pretrain.parity import KINDS, TOLERANCE, Verdict, judge
from pretrain.parity_ranks import layout_job, oracle, run_layout, write_seed_checkpoint
from pretrain.trials import Trial, make_trials
from slurm.environ import LaunchEnv

EXIT_DEPARTED = 1


def run_gate(config: RunConfig, args: Any) -> int:
    """Try every layout; returns 0 when all agree with the oracle and 1 when one departs."""
    env = LaunchEnv.read()
    launched = env.world_size > 1
    trials = make_trials(config, args.layout, args.micro_batches, args.full_size, env.world_size if launched else None)
    tolerance = args.tolerance or (TOLERANCE * 10 if launched and torch.cuda.is_available() else TOLERANCE)
    verdicts = []
    say = Console(stderr=True, quiet=env.rank != 0)
    for verdict in (
        _on_launched(env, trials, args.steps, tolerance) if launched else _here(trials, args.steps, tolerance)
    ):
        verdicts.append(verdict)
        word = "agrees" if verdict.agrees else f"departs: {verdict.departure}"
        say.print(f"{verdict.layout} on {verdict.ranks} rank(s), {verdict.seconds:.1f} s: {word}", highlight=False)
    agree = all(verdict.agrees for verdict in verdicts)
    if env.rank == 0:
        _tell(config, verdicts, tolerance, agree, args.json)
    return 0 if agree else EXIT_DEPARTED


def _here(trials: list[Trial], steps: int, tolerance: float) -> Iterator[Verdict]:
    """Each layout on gloo ranks of its own, started on this machine."""
    with tempfile.TemporaryDirectory(prefix="glam-parity-") as scratch:
        seed = Path(scratch) / "seed"
        write_seed_checkpoint(trials[0].config, seed)
        truth = oracle(trials[0].config, steps)
        for trial in trials:
            began = time.perf_counter()
            timeout_s = 300.0 + 30.0 * trial.ranks
            found = run_ranks(trial.ranks, layout_job, trial.config, str(seed), steps, timeout_s=timeout_s)
            verdict = judge(trial.layout, trial.config, found, truth, tolerance)
            yield replace(verdict, seconds=time.perf_counter() - began)


def _on_launched(env: LaunchEnv, trials: list[Trial], steps: int, tolerance: float) -> Iterator[Verdict]:
    """Each layout on the ranks of this job; rank 0 computes the oracle, all get the verdicts."""
    config = trials[0].config
    timeout_s = config.cluster.collective_timeout_s
    settings: dict[str, object] = {"trials": [trial.config.model_dump(mode="json") for trial in trials]}
    with tempfile.TemporaryDirectory(prefix="glam-parity-") as scratch:
        # On a local disk: each rank writes the same small seed checkpoint for itself.
        seed, truth = Path(scratch) / "seed", None
        write_seed_checkpoint(config, seed)
        device = groups.start(
            env.rank, env.world_size, env.local_rank, env.master_addr, env.master_port, timeout_s, settings
        )
        try:
            if env.rank == 0:
                truth = oracle(config, steps, str(device))
            for trial in trials:
                began = time.perf_counter()
                topology = make_topology(trial.config, env)
                found = collectives.gather_on_first(run_layout(trial.config, topology, device, str(seed), steps))
                verdict = None
                if found is not None and truth is not None:
                    verdict = judge(trial.layout, trial.config, found, truth, tolerance)
                    verdict.seconds = time.perf_counter() - began
                yield collectives.same_on_all_ranks(verdict)
            groups.stop()
        except BaseException:
            groups.abandon()
            raise


def _tell(config: RunConfig, verdicts: list[Verdict], tolerance: float, agree: bool, as_json: bool) -> None:
    if as_json:
        listed = [verdict.as_json() for verdict in verdicts]
        print(json.dumps({"config": config.name, "tolerance": tolerance, "agree": agree, "layouts": listed}))
        return
    table = Table(title=f"{config.name}: worst relative error against one process (tolerance {tolerance:.0e})")
    table.add_column("layout")
    table.add_column("ranks", justify="right")
    for kind in KINDS:
        table.add_column(kind, justify="right")
    table.add_column("")
    for verdict in verdicts:
        errors = [f"{verdict.errors[kind]:.0e}" for kind in KINDS]
        table.add_row(
            verdict.layout, str(verdict.ranks), *errors, "agrees" if verdict.agrees else "[bold red]departs[/]"
        )
    console = Console()
    console.print(table)
    for verdict in verdicts:
        if verdict.departure:
            console.print(f"{verdict.layout} departs first in the {verdict.departure}", highlight=False)
    sys.stdout.flush()
