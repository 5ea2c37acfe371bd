"""A cluster, as `glam submit` meets it: one YAML file a site, written by whoever knows the machine.

Values that end up in a line of sbatch options, which has no quoting to rely on, are held to patterns. `setup` alone is
shell on purpose.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator
from typing_extensions import Self

from configs.base import Strict

LAUNCHERS = ("srun", "deepspeed", "torchrun")
LIMIT_TICK_S = 60  # SLURM looks at limits every 30 s, and may warn as much late again
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?")
# What the script itself decides; a second say would win or lose by the order of lines.
_OWN_OPTIONS = (
    "job-name", "partition", "account", "qos", "nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "gres", "mem",
    "time", "requeue", "no-requeue", "open-mode", "signal", "output", "error", "chdir", "array", "wrap", "export",
    "test-only", "parsable", "wait", "hold", "dependency",
)  # fmt: skip


def _one_line(text: str) -> str:
    if re.search(r"[\x00-\x08\x0a-\x1f\x7f\x85\u2028\u2029]", text):
        raise ValueError("holds a line break or another control character")
    return text


Line = Annotated[str, AfterValidator(_one_line)]  # any text of one line; the script quotes it
Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.:,@+-]*$")]  # as SLURM's names are made
Option = Annotated[str, Field(pattern=r"^--[a-z][a-z0-9-]*(=[A-Za-z0-9_./:,@+=*&|()\[\]!-]+)?$")]
VariableName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class ContainerConfig(Strict):
    """The ranks run inside: `prefix` mount_option mount ... image python ..."""

    prefix: tuple[Line, ...] = Field(min_length=1)  # [apptainer, exec, --nv]
    image: Line
    mounts: tuple[Line, ...] = ()  # host:container; the run folder and the data must be seen under the same path
    mount_option: Line = "--bind"


class SiteConfig(Strict):
    """What a job asks of this cluster, and how it lives on it."""

    partition: Word | None = None  # null: SLURM's default
    account: Word | None = None
    qos: Word | None = None
    ranks_per_node: int = Field(ge=1)
    cpus_per_rank: int = Field(default=1, ge=1)
    gpus_per_node: int = Field(default=0, ge=0)
    gpu_type: Word | None = None
    memory: str | None = Field(default=None, pattern=r"^[0-9]+[KMGT]?$")  # of a node; "0" is all of it
    time_limit: str = Field(pattern=r"^([0-9]+-)?[0-9]+(:[0-9]+){0,2}$")  # as sbatch --time
    # This long before the limit the ranks are asked to save: at least a minute more than a save takes.
    warning_s: int = Field(default=300, ge=LIMIT_TICK_S)
    storage_bytes_per_s: float | None = Field(default=None, gt=0)  # of checkpoints, all ranks together; null: unknown
    setup: tuple[Line, ...] = ()  # lines of shell before anything else: module load, source .../activate
    container: ContainerConfig | None = None
    env: dict[VariableName, Line] = Field(default_factory=dict)  # NCCL_*, interfaces
    python: Line | None = None  # null: the one that runs `glam submit`; in a container: python
    run_root: Line | None = None  # where run folders with relative names lie; null: the folder of `glam submit`
    workdir: Line | None = None  # what relative paths of the data start from; null: the folder of `glam submit`
    launcher: Literal["srun", "deepspeed", "torchrun"] = "srun"
    mpi: Word = "pmi2"  # for `glam submit --prep`; see srun --mpi=list
    sbatch_options: tuple[Option, ...] = ()
    srun_options: tuple[Option, ...] = ()
    max_restarts: int = Field(default=10, ge=0)  # after faults, a submit; stops and preemptions are not counted
    max_without_progress: int = Field(default=3, ge=1)  # faults in a row at the same checkpoint
    kill_wait_s: int = Field(default=60, ge=1)  # ranks that have ended, and a step that has not

    @model_validator(mode="after")
    def _check(self) -> Self:
        faults = []
        if self.warning_s >= self.time_limit_s:
            faults.append(f"warning_s={self.warning_s} leaves nothing of time_limit={self.time_limit}")
        if self.gpu_type and not self.gpus_per_node:
            faults.append(f"gpu_type={self.gpu_type} with gpus_per_node=0")
        own = [option for option in self.sbatch_options if option[2:].split("=")[0] in _OWN_OPTIONS]
        if own:
            faults.append(f"sbatch_options: {' '.join(own)} is set by the script itself or by a key of its own")
        if faults:
            raise ValueError("; ".join(faults))
        return self

    @property
    def time_limit_s(self) -> int:
        """As sbatch reads it: M, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
        match = _TIME.fullmatch(self.time_limit)
        assert match, self.time_limit
        days = match["days"]
        first, second, third = (int(match[part] or 0) for part in ("first", "second", "third"))
        if days is not None:
            return int(days) * 86400 + first * 3600 + second * 60 + third
        if match["third"] is not None:
            return first * 3600 + second * 60 + third
        return first * 60 + second
