"""What is here: memory of this rank's device, and which preset fits it."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from configs.errors import UserError
from configs.layout import layout_faults, nearest_layout
from configs.parallel import ParallelConfig
from configs.run import PRESETS, RunConfig
from pretrain import budget


def memory_per_rank(local_world_size: int) -> tuple[int, str]:
    """Bytes each rank may use, and what they are bytes of."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory, f"{torch.cuda.get_device_name(0)} memory"
    return psutil.virtual_memory().total // local_world_size, "main memory, no GPU"


def free_main_memory() -> int:
    """Bytes this machine, and the control groups that hold this process (a SLURM job, a container), can still give."""
    return max(0, min([psutil.virtual_memory().available, *_free_in_control_groups()]))


def _free_in_control_groups() -> Iterator[int]:
    """Limit less use of each group from ours up to the root, cached files not counted; nothing where there is none."""
    try:
        lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    except OSError:
        return
    for number, controllers, path in lines:
        names = ("memory.max", "memory.current", "inactive_file")
        root = Path("/sys/fs/cgroup")
        if "memory" in controllers.split(","):  # the older hierarchy
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            root = root / "memory"
        elif number != "0":
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(root):
                break
            try:
                limit, used, stat = ((folder / name).read_text() for name in (*names[:2], "memory.stat"))
                cached = next(int(row.split()[1]) for row in stat.splitlines() if row.split()[0] == names[2])
                yield int(limit) - int(used) + cached
            except (OSError, ValueError, StopIteration):  # no limit ("max"), or no such file at the root
                continue


def keep_freed_memory() -> None:
    """On a CPU with glibc, let the allocator keep what is freed instead of handing it back to the system.

    A step's large activations are otherwise mapped, zeroed and unmapped anew each time: 15-20% of a step. Resident
    memory stays at its peak, which a training run reaches at every step anyway.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not torch.cuda.is_available():
        mallopt(-4, 0)  # M_MMAP_MAX: no block is a mapping of its own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap is never cut


def refuse_if_too_small(config: RunConfig, world_size: int, local_world_size: int) -> None:
    """Raise a UserError that says what the run needs, what is there, and which preset would fit."""
    if torch.cuda.is_available() and torch.cuda.device_count() < local_world_size:
        raise UserError(
            f"{local_world_size} rank(s) and {torch.cuda.device_count()} GPU(s) on this machine",
            "a GPU for each rank",
            "start as many ranks as there are GPUs, or hide them (CUDA_VISIBLE_DEVICES=) to run on the CPU",
        )
    there, kind = memory_per_rank(local_world_size)
    if config.cluster.device_memory_gib is not None:
        there, kind = round(config.cluster.device_memory_gib * 2**30), "cluster.device_memory_gib"
    faults = layout_faults(config, world_size)
    asked = required_ranks(config, world_size)
    need = budget.bytes_per_rank(config, asked).total
    if need <= there and not faults:
        return
    p = budget.parameters(config.model)
    remedy = "mend the keys named above"
    if need > there or asked > world_size:
        fits = largest_preset_that_fits(world_size, there)
        launch = f"deepspeed --num_accelerators {asked} pretrain/main.py --config ..."
        remedy = (
            f"start {asked} ranks ({launch}), or on a cluster under SLURM"
            if need <= there
            else "use more or larger devices"
        )
        remedy += f"; what fits here: --config {fits}" if fits else "; no preset fits here"
    if faults and need <= there and (nearest := nearest_layout(config, world_size)):
        remedy += f"; the nearest layout that works on {world_size} rank(s): {nearest}"
    found = f"{world_size} rank(s) with {_gib(there)} each ({kind})"
    raise UserError(
        found + "".join(f"; {fault}" for fault in faults),
        f"for {config.name} ({_count(p.total)} parameters, {_count(p.active)} active per token): "
        f"{asked} rank(s) with {_gib(need)} each",
        remedy,
    )


def required_ranks(config: RunConfig, world_size: int) -> int:
    """Ranks the layout asks for; where data=auto, the smallest multiple that carries the experts."""
    p = config.parallel
    if p.data != "auto":
        return p.data * p.model_ranks
    least = p.fewest_ranks
    return world_size if world_size % least == 0 else max(least, world_size // least * least)


def largest_preset_that_fits(world_size: int, bytes_there: int) -> str | None:
    """Arguments for the shipped preset with most parameters that trains on these ranks, experts spread over them."""
    best: tuple[int, str] | None = None
    for path in sorted(PRESETS.glob("*.yaml")):
        if path.name.startswith("corpus"):
            continue
        preset = RunConfig.load(path)
        num_experts = preset.model.moe.num_experts if preset.model.moe else 1
        expert = math.gcd(num_experts, world_size)
        spread = preset.model_copy(update={"parallel": ParallelConfig(expert=expert)})
        if layout_faults(spread, world_size) or budget.bytes_per_rank(spread, world_size).total > bytes_there:
            continue
        size = budget.parameters(preset.model).total
        if best is None or size > best[0]:
            changed = "" if expert == preset.parallel.expert else f" parallel.expert={expert}"
            best = (size, f"{PRESETS.name}/{path.name}{changed}")
    return best[1] if best else None


def _gib(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB"


def _count(count: int) -> str:
    return f"{count / 1e9:,.1f}B" if count >= 1e9 else f"{count / 1e6:,.1f}M"
