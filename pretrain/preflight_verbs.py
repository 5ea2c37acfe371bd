"""`glam preflight`: on the ranks of a launcher, or on a few of its own, started here."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from configs.errors import EXIT_BAD_INPUT, EXIT_DONE, EXIT_FAILED, RankFailed, UserError
from configs.run import RunConfig
from slurm.environ import LaunchEnv

if TYPE_CHECKING:
    from pretrain.preflight_report import Check, Report

_TIMEOUT_S = 120.0  # of any collective here: a preflight that waits for half an hour is none
_COLOURS = {"ok": "green", "warn": "yellow", "no": "bold red", "left out": "dim"}


def preflight(args: Any) -> int:
    """Returns 0 where nothing speaks against the run, 1 where a check says no."""
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # its stack traces would bury what is told
    env = LaunchEnv.read()
    try:
        config = RunConfig.load(args.config, args.overrides)
        fault = _missing_data(config)
        if fault and env.world_size == 1:
            raise fault
        with contextlib.redirect_stdout(sys.stderr):  # deepspeed binds its log to stdout otherwise, into --json
            report = _on_launched(env, config, fault) if env.world_size > 1 else _here(config)
    except UserError as error:
        if env.rank == 0:  # every rank meets the same error; one tells it
            raise
        raise RankFailed(EXIT_BAD_INPUT) from error
    if env.rank == 0:
        tell(report, args.json)
    return EXIT_DONE if report.passed else EXIT_FAILED


def _missing_data(config: RunConfig) -> UserError | None:
    """A path that nothing is at is a slip in the configuration; anything else about data is for the checks."""
    for path in [*(source.path for source in config.data.sources), *config.data.heldout]:
        if not Path(path).exists() and not Path(f"{path}.bin").exists():
            return UserError(f"no data at {path}", "a folder made by `glam prep`", "prepare it, or mend data.sources")
    return None


def _on_launched(env: LaunchEnv, config: RunConfig, fault: UserError | None) -> Report:
    """On the ranks of this job."""
    from parallel.failures import working_together
    from pretrain import build
    from pretrain.preflight import preflight_on_ranks

    if env.rank:
        fault = None  # what only some ranks lack is told with the rest
    device = build.meet(_impatient(config), env, fault or _too_few_gpus(env))
    with working_together(env.rank, env.world_size):
        topology = _topology(config, env)
        return preflight_on_ranks(config, topology, device, env.local_world_size, progress=say)


def _here(config: RunConfig) -> Report:
    """On gloo ranks started on this machine, where the layout asks for more on its degrees brought down to two."""
    from pretrain.local_ranks import run_ranks
    from pretrain.machine import required_ranks
    from pretrain.trials import DEGREES, SHORT, halved

    degrees = dict.fromkeys(DEGREES, 1) | dict(
        (key, int(value)) for key, _, value in (part.partition("=") for part in halved(config).split(","))
    )
    parallel = config.parallel.model_copy(update={SHORT[key]: degree for key, degree in degrees.items()})
    ranks = parallel.data_degree(1) * parallel.model_ranks
    meant = required_ranks(config, ranks)
    timeout_s = _TIMEOUT_S + 30.0 * ranks
    found = run_ranks(ranks, preflight_job, config, parallel.model_dump(), meant, timeout_s=timeout_s)
    report: Report = found[0]
    return report


def preflight_job(env: LaunchEnv, config: RunConfig, parallel: dict[str, Any], ranks_meant: int) -> Report:
    """One rank of those started here.

    Args:
        parallel: the layout of these ranks.
    """
    from parallel import groups
    from pretrain import build
    from pretrain.preflight import preflight_on_ranks

    small = config.model_copy(update={"parallel": config.parallel.model_copy(update=parallel)})
    device = build.meet(_impatient(config), env)
    topology = build.make_topology(small, env)
    report = preflight_on_ranks(config, topology, device, env.local_world_size, False, ranks_meant, say)
    groups.stop()
    return report


def _topology(config: RunConfig, env: LaunchEnv) -> Any:
    """The layout on the ranks that are there; where it does not fit, ranks side by side, for all that needs none."""
    from configs.layout import layout_faults
    from parallel.topology import Topology
    from pretrain import build

    fits = not layout_faults(config, env.world_size)
    return build.make_topology(config, env) if fits else Topology(env.rank, env.world_size)


def _too_few_gpus(env: LaunchEnv) -> UserError | None:
    """A rank without a GPU of its own cannot even meet the others."""
    import torch

    if not torch.cuda.is_available() or torch.cuda.device_count() > env.local_rank:
        return None
    return UserError(
        f"rank {env.rank} is number {env.local_rank} of its machine, which shows it {torch.cuda.device_count()} GPU(s)",
        "a GPU for each rank",
        "start as many ranks as there are GPUs, or hide them (CUDA_VISIBLE_DEVICES=) to run on the CPU",
    )


def _impatient(config: RunConfig) -> RunConfig:
    cluster = config.cluster
    timeout_s = min(_TIMEOUT_S, cluster.collective_timeout_s)
    return config.model_copy(update={"cluster": cluster.model_copy(update={"collective_timeout_s": timeout_s})})


def say(checks: list[Check]) -> None:
    """An answer as it comes, beside the table at the end."""
    for check in checks:
        print(f"{check.name}: {check.status}", file=sys.stderr, flush=True)


def tell(report: Report, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report.as_json()))
        return
    # Into a file or a pipe a table goes whole, whatever width a terminal would have.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table_of(report))
    noes = [check.name for check in report.checks if check.status == "no"]
    verdict = f"no: {', '.join(noes)}" if noes else "nothing speaks against this run"
    console.print(f"{verdict} ({report.seconds:.1f} s)", style="bold red" if noes else "bold", highlight=False)
    sys.stdout.flush()


def table_of(report: Report) -> Table:
    table = Table(title=f"{report.name}: preflight on {report.ranks} rank(s), {report.layout}")
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    table.add_column("what to do", overflow="fold")
    for check in report.checks:
        mark = f"[{_COLOURS[check.status]}]{check.status}[/]"
        table.add_row(check.name, mark, _plain(check.found), _plain(check.remedy))
    return table


def _plain(text: str) -> str:
    """Brackets in it are no markup."""
    return text.replace("[", r"\[")
