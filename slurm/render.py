"""From a plan to the text of an sbatch script. Pure: nothing is asked, nothing is written.

Two kinds of text never meet. The life of a job is in templates/*.sh, into which nothing is substituted. What varies
stands above it: sbatch options, where each value fits a pattern, as sbatch's own reading of quotes is not to be relied
on; and shell words, each quoted. The site's `setup` lines alone are shell on purpose.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from configs.site import SiteConfig
from slurm.environ import SUBMITTED
from slurm.nodes import Nodes

_TEMPLATES = Path(__file__).parent / "templates"
_VALUE = re.compile(r"[A-Za-z0-9_./:,@+=*&|()\[\]!~-]+")  # no space, quote, "#", "%", "\" or line end
# Between the warning and the limit: what SLURM's ticks may take, ending the step, the verdict.
_MARGIN_S = 45


@dataclass(frozen=True)
class JobPlan:
    """All that a script is made of."""

    name: str
    run_dir: Path
    submit_dir: Path  # code/, config.yaml, job.sbatch, job.log
    workdir: Path  # what relative paths of the data start from
    site: SiteConfig
    nodes: Nodes
    launcher: str
    python: str

    @property
    def script(self) -> Path:
        return self.submit_dir / "job.sbatch"

    @property
    def config(self) -> Path:
        return self.submit_dir / "config.yaml"  # as the templates name it

    @property
    def log(self) -> Path:
        return self.submit_dir / "job.log"

    @property
    def code(self) -> Path:
        return self.submit_dir / "code"


# MPICH's other network module has addresses so long that SLURM's pmi2, which reads them in pieces, loses its place now
# and then (SLURM 22.05, MPICH 5.0: one start in five failed or hung; with this none of fourteen).
_PREP_ENV = (("MPIR_CVAR_CH4_NETMOD", "ofi"),)


def render_training(plan: JobPlan) -> str:
    """The script of a training job."""
    limits = {
        "GIVE_UP_S": max(15, plan.site.warning_s - _MARGIN_S),
        "KILL_WAIT_S": plan.site.kill_wait_s,
        "MAX_RESTARTS": plan.site.max_restarts,
        "MAX_WITHOUT_PROGRESS": plan.site.max_without_progress,
        "PROCESSES": "hidden" if plan.site.container else "visible",  # whether a rank's process id means it out here
    }
    return _script(plan, limits, (), _task(plan), _launch(plan), ("common.sh", "train.sh"))


def render_prep(plan: JobPlan) -> str:
    """The script of a job that prepares a corpus."""
    task = ['exec "${PYTHON[@]}" "$CODE/pretrain/cli.py" prep "$SUBMIT/config.yaml"']
    launch = [_srun(plan, plan.nodes.ranks_per_node, plan.site.cpus_per_rank, f"--mpi={plan.site.mpi}")]
    return _script(plan, {}, _PREP_ENV, task, launch, ("common.sh", "prep.sh"))


def _script(
    plan: JobPlan,
    limits: dict[str, int | str],
    more_env: Sequence[tuple[str, str]],
    task: Sequence[str],
    launch: Sequence[str],
    templates: Sequence[str],
) -> str:
    site = plan.site
    words = {"RUN": plan.run_dir, "SUBMIT": plan.submit_dir, "CODE": plan.code, "RANKS": plan.nodes.ranks, **limits}
    # Of the shell in which `glam submit` was typed: they would tell each rank that it is another.
    stale = "unset RANK WORLD_SIZE LOCAL_RANK LOCAL_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"
    env = {"OMP_NUM_THREADS": str(site.cpus_per_rank), "PYTHONUNBUFFERED": "1", **dict(more_env), **site.env}
    lines = [
        "#!/bin/bash",
        "# Made by `glam submit`. What this job runs lies beside this file: an edit of the checkout changes nothing.",
        *_directives(plan),
        "",
        *(f"{name}={shlex.quote(str(value))}" for name, value in words.items()),
        f"PYTHON=({shlex.join(_python(plan))})",
        "",
        "task() { # what each task of the step runs: this script again, with the word task",
        *(f"    {line}" for line in task),
        "}",
        'if [ "${1:-}" = task ]; then task; fi',
        "",
        "# ---- the site's own ----",
        stale,
        *site.setup,
        "set -u",
        *(f"export {name}={shlex.quote(value)}" for name, value in env.items()),
        f'export {SUBMITTED}="$SUBMIT"',
        'export PYTHONPATH="$CODE${PYTHONPATH:+:$PYTHONPATH}"',
        "",
        "launch() {",
        *(f"    {line}" for line in launch),
        "}",
        "",
    ]
    return "\n".join(lines) + "\n" + "\n".join((_TEMPLATES / name).read_text(encoding="utf-8") for name in templates)


def _directives(plan: JobPlan) -> list[str]:
    site = plan.site
    gpus = f"gpu:{site.gpu_type}:{site.gpus_per_node}" if site.gpu_type else f"gpu:{site.gpus_per_node}"
    options = {
        "job-name": plan.name,
        "partition": site.partition,
        "account": site.account,
        "qos": site.qos,
        "nodes": plan.nodes.count,
        "ntasks-per-node": plan.nodes.ranks_per_node,
        "cpus-per-task": site.cpus_per_rank,
        "gres": gpus if site.gpus_per_node else None,
        "mem": site.memory,
        "time": site.time_limit,
        "signal": f"B:USR1@{site.warning_s}",
        "chdir": plan.workdir,
        "output": plan.log,
        "open-mode": "append",
    }
    fixed = [f"#SBATCH --{name}={_checked(name, str(value))}" for name, value in options.items() if value is not None]
    return [
        *fixed,
        "#SBATCH --requeue",
        *(f"#SBATCH {_checked('an option', option)}" for option in site.sbatch_options),
    ]


def _checked(name: str, value: str) -> str:
    if not _VALUE.fullmatch(value):
        found = f"{value!r} for sbatch's {name}"
        raise UserError(found, "letters, digits and _ . / : , @ + = -", "choose a name or a folder without the others")
    return value


def _python(plan: JobPlan) -> list[str]:
    if not (box := plan.site.container):
        return [plan.python]
    mounts = [word for mount in box.mounts for word in (box.mount_option, mount)]
    return [*box.prefix, *mounts, box.image, plan.python]


def _task(plan: JobPlan) -> list[str]:
    """Shell lines; one task a rank under srun, one a node under the launchers."""
    # Until the trainer listens it would die of USR1, and so would the launchers; the batch script says it again.
    deaf, script = "trap '' USR1", '"$CODE/pretrain/main.py" --config "$SUBMIT/config.yaml"'
    meet = '--master_addr="$MASTER_ADDR" --master_port="$MASTER_PORT"'
    if plan.launcher == "deepspeed":
        nodes = '--no_ssh --node_rank="$SLURM_NODEID" --hostfile="$SUBMIT/hostfile"'
        words = ["-m deepspeed.launcher.runner", nodes, meet, script]
    elif plan.launcher == "torchrun":
        nodes = f"--nnodes={plan.nodes.count} --nproc_per_node={plan.nodes.ranks_per_node} --max_restarts=0"
        words = ["-m torch.distributed.run", f'{nodes} --node_rank="$SLURM_NODEID"', meet, script]
    else:
        words = [script]
    return [deaf, 'exec "${PYTHON[@]}" ' + " \\\n        ".join(words)]


def _launch(plan: JobPlan) -> list[str]:
    nodes, site = plan.nodes, plan.site
    if plan.launcher == "srun":
        return [_srun(plan, nodes.ranks_per_node, site.cpus_per_rank)]
    hosts = 'scontrol show hostnames "$SLURM_JOB_NODELIST"'
    lines = [
        f"MASTER_ADDR=$({hosts} | head -n 1) MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))",
        "export MASTER_ADDR MASTER_PORT",
    ]
    if plan.launcher == "deepspeed":
        lines.append(f'{hosts} | sed "s/\\$/ slots={nodes.ranks_per_node}/" >"$SUBMIT/hostfile"')
    return [*lines, _srun(plan, 1, nodes.ranks_per_node * site.cpus_per_rank)]


def _srun(plan: JobPlan, tasks_per_node: int, cpus: int, *more: str) -> str:
    count = plan.nodes.count
    spread = f"--nodes={count} --ntasks={count * tasks_per_node} --ntasks-per-node={tasks_per_node}"
    options = shlex.join([*more, *plan.site.srun_options])
    words = f"exec srun --kill-on-bad-exit=1 {spread} --cpus-per-task={cpus} {options}".rstrip()
    return words + ' \\\n        bash "$SUBMIT/job.sbatch" task'
