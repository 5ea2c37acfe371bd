"""`glam parity` itself: starts ranks here, or uses those that were launched, and tells the verdicts."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from configs.errors import EXIT_BAD_INPUT, RankFailed, UserError
from configs.run import RunConfig
from parallel import collectives
from parallel.failures import working_together
from parallel.topology import Topology
from pretrain import build
from pretrain.local_ranks import run_ranks
from pretrain.parity import KINDS, TOLERANCE, Verdict, judge
from pretrain.parity_ranks import Figures, layout_job, oracle, run_layout, write_seed_checkpoint
from pretrain.trials import Trial, make_trials
from slurm.environ import LaunchEnv

EXIT_DEPARTED = 1


def run_gate(config: RunConfig, args: Any) -> int:
    """Try every layout; returns 0 when all agree with the oracle and 1 when one departs."""
    env = LaunchEnv.read()
    launched = env.world_size > 1
    ranks_there = env.world_size if launched else None
    try:
        trials = make_trials(config, args.layout, args.micro_batches, args.full_size, ranks_there)
    except UserError as error:
        if env.rank == 0:  # every rank meets the same error; one tells it
            raise
        raise RankFailed(EXIT_BAD_INPUT) from error
    tolerance = args.tolerance or (TOLERANCE * 10 if launched and torch.cuda.is_available() else TOLERANCE)
    verdicts = []
    say = Console(stderr=True, quiet=env.rank != 0)
    for verdict in (
        _on_launched(env, trials, args.steps, tolerance) if launched else _here(trials, args.steps, tolerance)
    ):
        verdicts.append(verdict)
        word = f"agrees {verdict.note}".strip() if verdict.agrees else f"departs: {verdict.departure}"
        say.print(f"{verdict.layout} on {verdict.ranks} rank(s), {verdict.seconds:.1f} s: {word}", highlight=False)
    agree = all(verdict.agrees for verdict in verdicts)
    if env.rank == 0:
        _tell(config, verdicts, tolerance, agree, args.json)
    return 0 if agree else EXIT_DEPARTED


def _here(trials: list[Trial], steps: int, tolerance: float) -> Iterator[Verdict]:
    """Each layout on gloo ranks of its own, started on this machine."""
    with tempfile.TemporaryDirectory(prefix="glam-parity-") as scratch:
        seeds = _seed_checkpoints(trials[0].config, Path(scratch))
        truths: dict[int, Figures] = {}

        def attempt(trial: Trial, number: int) -> Verdict:
            config = _reseeded(trial.config, number)
            truths[number] = truths.get(number) or oracle(config, steps)
            timeout_s = 300.0 + 30.0 * trial.ranks
            found = run_ranks(trial.ranks, layout_job, config, str(seeds[number]), steps, timeout_s=timeout_s)
            return judge(trial.layout, config, found, truths[number], tolerance)

        for trial in trials:
            yield _confirmed(trial, attempt)


def _on_launched(env: LaunchEnv, trials: list[Trial], steps: int, tolerance: float) -> Iterator[Verdict]:
    """Each layout on the ranks of this job."""
    device = build.meet(trials[0].config, env)
    with tempfile.TemporaryDirectory(prefix="glam-parity-") as scratch, working_together(env.rank, env.world_size):
        truths: dict[int, Figures] = {}
        for trial in trials:
            topology = build.make_topology(trial.config, env)
            yield try_on_ranks(trial, topology, device, Path(scratch), steps, tolerance, truths)


def try_on_ranks(
    trial: Trial,
    topology: Topology,
    device: torch.device,
    scratch: Path,
    steps: int,
    tolerance: float,
    truths: dict[int, Figures] | None = None,
) -> Verdict:
    """One layout on ranks that have met and have made no groups; rank 0 computes the oracle, all get the verdict.

    Args:
        scratch: a folder of this rank alone, on a local disk: each writes the same small checkpoints for itself.
        truths: the oracle's, by seed: kept from one layout of a model to the next.
    """
    known = {} if truths is None else truths

    def attempt(trial: Trial, number: int) -> Verdict:
        config, seed = _reseeded(trial.config, number), scratch / f"seed-{number}"
        if not seed.exists():
            write_seed_checkpoint(config, seed)
        mine = run_layout(config, topology, device, str(seed), steps)
        verdict = None
        if (found := collectives.gather_on_first(mine)) is not None:
            known[number] = known.get(number) or oracle(config, steps, str(device))
            verdict = judge(trial.layout, config, found, known[number], tolerance)
        verdict = collectives.same_on_all_ranks(verdict)
        assert verdict is not None
        return verdict

    return _confirmed(trial, attempt)


def _confirmed(trial: Trial, attempt: Callable[[Trial, int], Verdict]) -> Verdict:
    """Where a token may have lain so near a tie that rounding sent it to another expert, a departure counts only if
    other weights and tokens depart too: a fault of the layout shows in every stream."""
    began = time.perf_counter()
    verdict = attempt(trial, 0)
    if not verdict.agrees and may_be_near_a_tie(trial, verdict):
        first = verdict.departure
        verdict = attempt(trial, 1)
        if verdict.agrees:
            verdict.note = f"with a second seed; with the first, a token near a tie: {first}"
    verdict.seconds = time.perf_counter() - began
    return verdict


def may_be_near_a_tie(trial: Trial, verdict: Verdict) -> bool:
    """Whether routers decided otherwise; where experts choose, each takes as many tokens whichever they are, so that
    loads cannot tell."""
    moe = trial.config.model.moe
    return verdict.loads_differ or (moe is not None and moe.router.kind == "expert_choice")


def _seed_checkpoints(config: RunConfig, folder: Path) -> list[Path]:
    """What every layout starts from, twice."""
    paths = [folder / f"seed-{number}" for number in range(2)]
    for number, path in enumerate(paths):
        write_seed_checkpoint(_reseeded(config, number), path)
    return paths


def _reseeded(config: RunConfig, number: int) -> RunConfig:
    return config.model_copy(update={"train": config.train.model_copy(update={"seed": config.train.seed + number})})


def _tell(config: RunConfig, verdicts: list[Verdict], tolerance: float, agree: bool, as_json: bool) -> None:
    if as_json:
        listed = [verdict.as_json() for verdict in verdicts]
        print(json.dumps({"config": config.name, "tolerance": tolerance, "agree": agree, "layouts": listed}))
        return
    table = Table(title=f"{config.name}: worst relative error against one process (tolerance {tolerance:.0e})")
    table.add_column("layout", no_wrap=True)
    table.add_column("ranks", justify="right")
    for kind in KINDS:
        table.add_column(kind, justify="right", no_wrap=True)
    table.add_column("")
    for verdict in verdicts:
        errors = [f"{verdict.errors[kind]:.0e}" for kind in KINDS]
        table.add_row(
            verdict.layout, str(verdict.ranks), *errors, "agrees" if verdict.agrees else "[bold red]departs[/]"
        )
    # Into a file or a pipe a table goes whole, whatever width a terminal would have.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    for verdict in verdicts:
        if verdict.departure:
            console.print(f"{verdict.layout} departs first in the {verdict.departure}", highlight=False)
    sys.stdout.flush()
