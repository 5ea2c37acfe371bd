"""What `glam submit`, `glam stop` and `glam status` do."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.corpus import CorpusConfig
from configs.errors import UserError
from configs.run import RunConfig
from configs.site import SiteConfig
from pretrain.job_status import as_json, live_start, look_at, save_seconds, show
from pretrain.snapshot import copy_code
from slurm import run_folder
from slurm import submit as slurm
from slurm.nodes import Nodes, nodes_for
from slurm.render import JobPlan, render_prep, render_training

_SAVE_MARGIN_S = 60  # SLURM looks at limits every 30 s


# ---- submit ---------------------------------------------------------------------------------------------------------
def submit(args: Any) -> None:
    site = SiteConfig.load(args.cluster)
    plan, config = _plan_prep(args, site) if args.prep else _plan_training(args, site)
    script = render_prep(plan) if args.prep else render_training(plan)
    if args.dry_run:
        print(script, end="")
        return
    slurm.require()
    slurm.check_partition(site, plan.nodes.count, slurm.partitions())
    _make_writable(plan.run_dir)
    with _alone(plan.run_dir):
        _refuse_live(plan.run_dir)
        if isinstance(config, RunConfig):
            _refuse_done(plan.run_dir, config)
            _refuse_short_warning(config, site, plan.run_dir)
        job = _queue(plan, script, config)
    _tell(plan, job, is_run=not args.prep)


def _plan_training(args: Any, site: SiteConfig) -> tuple[JobPlan, RunConfig]:
    config = RunConfig.load(args.config, args.overrides)
    run_dir = _folder(site.run_root, config.run_dir)
    config = config.model_copy(update={"run_dir": str(run_dir)})
    plan = _plan(config.name, run_dir, site, nodes_for(config, site, args.nodes), args.launcher)
    return plan, config


def _plan_prep(args: Any, site: SiteConfig) -> tuple[JobPlan, CorpusConfig]:
    config = CorpusConfig.load(args.config, args.overrides)
    if args.launcher:
        raise UserError(
            f"--prep with --launcher {args.launcher}", "one of the two", "leave --launcher out: MPI starts it"
        )
    if args.nodes is not None and args.nodes < 1:
        raise UserError(f"--nodes {args.nodes}", "at least 1", "leave it out for one node")
    output = _folder(site.workdir, config.output)
    beside = output.with_name(f"{output.name}.jobs")  # in the corpus itself it would be foreign
    return _plan(f"prep-{output.name}", beside, site, Nodes(args.nodes or 1, site.ranks_per_node), "srun"), config


def _folder(root: str | None, name: str) -> Path:
    """An absolute path; relative names start at the site's folder, or here."""
    return Path(os.path.abspath(Path(root or ".").expanduser() / Path(name).expanduser()))


def _plan(name: str, run_dir: Path, site: SiteConfig, nodes: Nodes, launcher: str | None) -> JobPlan:
    last = run_folder.submit_folders(run_dir)
    number = int(last[-1].name) + 1 if last else 1
    return JobPlan(
        name=name,
        run_dir=run_dir,
        submit_dir=run_dir / run_folder.SUBMITS / f"{number:04d}",
        workdir=_folder(site.workdir, "."),
        site=site,
        nodes=nodes,
        launcher=launcher or site.launcher,
        python=site.python or ("python" if site.container else sys.executable),
    )


def _make_writable(run_dir: Path) -> None:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        probe = run_dir / f".submit-{socket.gethostname()}-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        remedy = "mend its permissions, or choose another run_dir (run_root in the cluster's file)"
        raise UserError(f"{run_dir} cannot be written: {error}", "a folder that can", remedy) from None


@contextlib.contextmanager
def _alone(run_dir: Path) -> Iterator[None]:
    """No second submit of this run at the same time, where the file system knows locks."""
    with (run_dir / ".submit.lock").open("w") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another submit of {run_dir} is under way", "one at a time", "see glam status") from None
        except OSError:  # no locks there; the check of live jobs is left
            pass
        yield


def _refuse_short_warning(config: RunConfig, site: SiteConfig, run_dir: Path) -> None:
    predicted = save_seconds(run_dir)
    if predicted is None and site.storage_bytes_per_s:
        from pretrain.budget import checkpoint_bytes

        predicted = checkpoint_bytes(config.model) / site.storage_bytes_per_s
    if predicted is not None and site.warning_s < int(predicted) + _SAVE_MARGIN_S:
        found = f"warning_s={site.warning_s}; a save takes {predicted:.0f} s, SLURM's clock ticks every 30 s"
        expected = f"at least {predicted + _SAVE_MARGIN_S:.0f}, or the limit comes before the save ends"
        raise UserError(found, expected, "raise warning_s in the cluster's file")


def _refuse_live(run_dir: Path) -> None:
    if jobs := _live_jobs(run_dir):
        job = jobs[0]
        found = f"job {job.id} of {run_dir} is {job.state} ({job.reason})"
        raise UserError(found, "one job a run", f"let it run, or end it first: glam stop {run_dir}")
    if start := live_start(run_dir):
        found = f"{run_dir} is being trained: {start}"
        raise UserError(found, "one owner of a run", f"let it run, or end it first: glam stop {run_dir}")


def _live_jobs(run_dir: Path) -> list[slurm.Job]:
    """Jobs of this run that SLURM still knows. Numbers may begin anew; names tell another's job."""
    records = [run_folder.read_object(folder / run_folder.JOB) for folder in run_folder.submit_folders(run_dir)]
    names = {str(record["job"]): record.get("name") for record in records if "job" in record}
    return [job for job in slurm.find_jobs(list(names)) if names.get(job.id) in (job.name, None)]


def _refuse_done(run_dir: Path, config: RunConfig) -> None:
    steps = run_folder.read_object(run_dir / run_folder.DONE).get("step")
    more = isinstance(steps, int) and config.train.steps > steps
    if run_folder.is_there(run_dir, run_folder.DONE) and not more:
        remedy = f"train.steps=N above {steps} goes on; another run_dir=... begins anew"
        raise UserError(f"{run_dir} is done ({steps} steps)", "a run with steps left", remedy)


def _queue(plan: JobPlan, script: str, config: RunConfig | CorpusConfig) -> str:
    """Copy code and configuration beside the run, clear the markers of before, and queue. If SLURM refuses, undone."""
    markers = [plan.run_dir / name for name in (run_folder.STOP, run_folder.DONE)]
    kept = {path: path.read_bytes() for path in markers if path.exists()}
    try:
        plan.submit_dir.mkdir(parents=True)
        copy_code(plan.code)
        plan.config.write_text(config.dump(), encoding="utf-8")
        (plan.submit_dir / "cluster.yaml").write_text(plan.site.dump(), encoding="utf-8")
        plan.script.write_text(script, encoding="utf-8")
        for path in kept:  # the job may start at once, and obeys them
            path.unlink(missing_ok=True)
        job = slurm.submit(plan.script)
        facts = {"job": job, "name": plan.name, "time": time.time(), "user": getpass.getuser()}
        facts |= {"host": socket.gethostname(), "nodes": plan.nodes.count, "ranks": plan.nodes.ranks}
        (plan.submit_dir / run_folder.JOB).write_text(json.dumps(facts) + "\n", encoding="utf-8")
    except (UserError, OSError) as error:
        for path, content in kept.items():
            path.write_bytes(content)
        shutil.rmtree(plan.submit_dir, ignore_errors=True)
        if isinstance(error, OSError):
            found = f"{plan.submit_dir} cannot be written: {error}"
            raise UserError(found, "room for code and configuration", "free space or mend permissions") from None
        raise
    return job


def _tell(plan: JobPlan, job: str, is_run: bool) -> None:
    nodes = plan.nodes
    print(
        f"job {job} is queued: {plan.name}, {nodes.count} node(s) x {nodes.ranks_per_node} rank(s), by {plan.launcher}"
    )
    print(f"  its place in the queue   squeue --jobs={job}")
    print(f"  its log                  tail -F {plan.log}")
    if is_run:
        print(f"  how it fares             glam status {plan.run_dir}")
        print(f"  save and end             glam stop {plan.run_dir}")


# ---- stop -----------------------------------------------------------------------------------------------------------
def stop(args: Any) -> None:
    run_dir = _run_folder(args.run)
    if run_folder.is_there(run_dir, run_folder.DONE):
        print(f"{run_dir} is done")
        return
    try:
        (run_dir / run_folder.STOP).touch()
    except OSError as error:
        raise UserError(f"{run_dir}/STOP cannot be written: {error}", "a folder that can", "mend permissions") from None
    jobs = _live_jobs(run_dir)
    for job in jobs:
        if job.state == "COMPLETING":
            print(f"job {job.id} is ending, and will not go on")
            continue
        slurm.ask_to_stop(job)
        ends = "is taken from the queue" if job.state == "PENDING" else "saves after its present step and ends"
        print(f"job {job.id} {ends}; glam submit goes on with the run")
    if not jobs:
        who = live_start(run_dir) or "no job of this run is in the queue; whatever trains it"
        print(f"{who} sees RUN/STOP after its present step, saves and ends")


# ---- status ---------------------------------------------------------------------------------------------------------
def status(args: Any) -> None:
    run_dir = _run_folder(args.run)
    jobs, why = list[slurm.Job](), None
    try:
        jobs = _live_jobs(run_dir)
    except UserError as error:  # on a machine without SLURM the folder still tells its part
        why = error.found
    found = replace(look_at(run_dir), jobs=tuple(jobs), slurm_silent=why)
    if args.json:
        print(json.dumps(as_json(found)))
    else:
        show(found)


def _run_folder(path: str) -> Path:
    run_dir = Path(os.path.abspath(path))
    marks = ("config.yaml", run_folder.STARTS, run_folder.SUBMITS)
    if not any((run_dir / mark).exists() for mark in marks):
        raise UserError(
            f"{run_dir} holds no run", "the folder of a run that was started or submitted", "check the path"
        )
    return run_dir
