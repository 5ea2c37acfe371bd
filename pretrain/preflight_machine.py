"""Preflight of the machines: programs, devices, memory, limits, what earlier jobs left behind, clocks."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import resource
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from configs.layout import nearest_layout
from parallel import collectives
from parallel.probe import backend_name
from pretrain import budget
from pretrain.machine import free_main_memory, memory_per_rank
from pretrain.preflight_report import GIB, Check, Status, Step, Where, gib, told_by

PACKAGE = "glam-pretrain"
ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("configs", "model", "data_prep", "slurm", "parallel", "pretrain")
SHARED_MEMORY = Path("/dev/shm")
LEFT_BY_DEEPSPEED = "deepspeed_allreduce_buffer_*"
_OPEN_FILES = 256  # beside connections: shards, a checkpoint's files, logs, libraries
_CLOCK_WARN_S, _CLOCK_NO_S = 1.0, 60.0


# ---- programs -------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Software:
    """What one rank runs. `misfits` and `missing` go by what setup.py asks for."""

    versions: dict[str, str]
    misfits: tuple[str, ...]
    missing: tuple[str, ...]
    code: str  # sha256 of the rooms


def look_at_software(where: Where) -> Software:
    versions = {"python": platform.python_version()}
    misfits, missing = list[str](), list[str]()
    for wanted in _requirements():
        try:
            versions[wanted.name] = found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(str(wanted))
            continue
        if not wanted.specifier.contains(found, prereleases=True):
            misfits.append(f"{wanted.name} {found}, expected {wanted.specifier}")
    if (wanted_python := _wanted_python()) and versions["python"] not in SpecifierSet(wanted_python):
        misfits.append(f"python {versions['python']}, expected {wanted_python}")
    return Software(versions, tuple(misfits), tuple(missing), _code_digest())


def judge_software(where: Where, found: list[Software]) -> list[Check]:
    words = {rank: [f"no {name}" for name in one.missing] + list(one.misfits) for rank, one in enumerate(found)}
    first, remedy = found[0], 'pip install -e "." in the environment that the ranks use'
    main = ", ".join(f"{name} {first.versions.get(name, '?')}" for name in ("python", "torch", "deepspeed"))
    main += f", megatron-core {first.versions.get('megatron-core', '?')}"
    numbers = {"versions": first.versions}
    if told := told_by(where, words):
        checks = [Check("versions", "no", told, remedy, numbers)]
    elif not _requirements():
        checks = [Check("versions", "warn", f"{main}; not installed, so what fits is not known", remedy, numbers)]
    else:
        checks = [Check("versions", "ok", f"{main} and {len(first.versions) - 3} more", numbers=numbers)]
    return checks + ([_judge_sameness(where, found)] if where.num_ranks > 1 else [])


def _judge_sameness(where: Where, found: list[Software]) -> Check:
    name = "same everywhere"
    [(usual, _)] = Counter(one.code for one in found).most_common(1)
    words = {rank: ["other program files"] for rank, one in enumerate(found) if one.code != usual}
    for package in sorted({name for one in found for name in one.versions}):
        versions = [one.versions.get(package, "none") for one in found]
        [(most, _)] = Counter(versions).most_common(1)
        for rank, version in enumerate(versions):
            if version != most:
                words.setdefault(rank, []).append(f"{package} {version}, elsewhere {most}")
    if told := told_by(where, words):
        return Check(name, "no", told, "start all ranks from one checkout and one environment, on a shared disk")
    return Check(name, "ok", f"program (sha256 {usual[:12]}) and packages of {where.num_ranks} ranks")


def _requirements() -> list[Requirement]:
    """What setup.py asks for, as installation has noted it; empty where the rooms run without being installed."""
    try:
        listed = importlib.metadata.requires(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return []
    parsed = [Requirement(text) for text in listed]
    return [wanted for wanted in parsed if wanted.marker is None or wanted.marker.evaluate({"extra": ""})]


def _wanted_python() -> str:
    try:
        return importlib.metadata.distribution(PACKAGE).metadata["Requires-Python"] or ""
    except importlib.metadata.PackageNotFoundError:
        return ""


def _code_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py")):
        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


# ---- devices and layout ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Device:
    """What computes for one rank."""

    backend: str
    gpus: int  # visible to this process
    installed: int  # that the driver knows, visible or not
    local_world_size: int
    name: str = ""
    identity: str = ""  # of the very GPU


def look_at_device(where: Where) -> Device:
    driver = Path("/proc/driver/nvidia/gpus")
    installed = len(list(driver.iterdir())) if driver.is_dir() else 0
    if where.device.type != "cuda":
        return Device(backend_name(), torch.cuda.device_count(), installed, where.local_world_size, platform.machine())
    properties = torch.cuda.get_device_properties(where.device)
    identity = str(getattr(properties, "uuid", where.device.index))
    count = torch.cuda.device_count()
    return Device(backend_name(), count, installed, where.local_world_size, properties.name, identity)


def judge_devices(where: Where, found: list[Device]) -> list[Check]:
    on_gpu = [rank for rank, one in enumerate(found) if one.identity]
    without = [rank for rank, one in enumerate(found) if not one.identity]
    kinds = Counter(one.name for one in found)
    said = ", ".join(f"{count} x {name}" for name, count in kinds.items()) if on_gpu else f"{len(found)} on the CPU"
    main, name = f"{said}, {found[0].backend}", "devices"
    if on_gpu and without:
        return [Check(name, "no", f"{main}; no GPU on {where.place(without)}", "give every rank a GPU, or none")]
    few = {
        rank: [f"{one.gpus} GPU(s) for {one.local_world_size} ranks of this machine"]
        for rank, one in enumerate(found)
        if one.identity and one.gpus < one.local_world_size
    }
    if few:
        return [Check(name, "no", told_by(where, few), "start as many ranks on a machine as it has GPUs")]
    places = [(where.hosts[rank], found[rank].identity) for rank in on_gpu]
    if twice := [rank for rank, place in zip(on_gpu, places) if places.count(place) > 1]:
        remedy = "bind each rank to a GPU of its own (srun --gpus-per-task, LOCAL_RANK)"
        return [Check(name, "no", f"one GPU shared by {where.place(twice)}", remedy)]
    if len(kinds) > 1:
        return [Check(name, "warn", f"{main}: the slowest sets the pace", "ask for nodes of one kind")]
    if not on_gpu and (idle := max(one.installed for one in found)):
        remedy = "start it through the launcher; see CUDA_VISIBLE_DEVICES and whether torch is a CUDA build"
        return [Check(name, "warn", f"{main}, beside {idle} GPU(s) that are not used", remedy)]
    return [Check(name, "ok", main)]


def judge_layout(where: Where, _: list[None]) -> list[Check]:
    p, count = where.config.parallel, where.ranks_meant
    here = "" if where.is_whole else f"; tried here on {where.num_ranks}"
    if faults := where.layout_faults:
        nearest = nearest_layout(where.config, count)
        remedy = f"the nearest that works on {count} rank(s): {nearest}" if nearest else "start another number of ranks"
        return [Check("layout", "no", "; ".join(faults), remedy)]
    return [Check("layout", "ok", f"{count:,} rank(s): {p.in_words(count)}{here}")]


# ---- memory ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Memory:
    """Bytes that one rank may use, of what, and those its machine can still give."""

    there: int
    kind: str
    free_main: int
    on_gpu: bool
    local_world_size: int


def look_at_memory(where: Where) -> Memory:
    there, kind = memory_per_rank(where.local_world_size)
    on_gpu = where.device.type == "cuda"
    return Memory(there, kind, free_main_memory(), on_gpu, where.local_world_size)


def judge_memory(where: Where, found: list[Memory]) -> list[Check]:
    need = budget.bytes_per_rank(where.config, where.ranks_meant)
    given = where.config.cluster.device_memory_gib
    if not where.is_whole and given is None:
        told = f"{gib(need.total)} a rank of {where.ranks_meant:,}; these are not they"
        return [
            Check("memory", "left out", told, "start it on the ranks of a job, or set cluster.device_memory_gib=...")
        ]
    rank = min(range(len(found)), key=lambda r: found[r].there)
    there, kind = (round(given * GIB), "cluster.device_memory_gib") if given else (found[rank].there, found[rank].kind)
    told = f"{gib(need.total)} a rank needed, {gib(there)} there ({kind})"
    numbers = {"bytes_needed": need.total, "bytes_there": there}
    remedy = "more ranks, a larger parallel degree, a smaller train.micro_batch_sequences or train.recompute=true"
    if need.total > there:
        return [Check("memory", "no", f"{told}: {where.place([rank])}", remedy, numbers)]
    checks = [Check("memory", "warn" if need.total > 0.9 * there else "ok", told, "", numbers)]
    if checks[0].status == "warn":
        checks = [Check("memory", "warn", f"{told}: close, as it is an estimate", remedy, numbers)]
    return checks + (_judge_main_memory(where, found, need) if where.is_whole else [])


def _judge_main_memory(where: Where, found: list[Memory], need: budget.RankBytes) -> list[Check]:
    """Training without GPUs, and the copies of saves beside training, live in main memory."""
    train = where.config.train
    saved = budget.checkpoint_bytes(where.config.model)
    copy = need.optimizer if where.config.parallel.zero_stage == 1 else saved // where.ranks_meant
    copy = copy if train.async_save else 0
    # Of a machine's ranks, each sees the same free memory.
    spare = [one.free_main - (0 if one.on_gpu else need.total) * one.local_world_size for one in found]
    rank = min(range(len(found)), key=lambda r: spare[r] - copy * found[r].local_world_size)
    one = found[rank]
    copies = copy * one.local_world_size
    told = f"{gib(one.free_main)} free now, {gib(one.free_main - spare[rank])} for training"
    told += f", {gib(copies)} for copies of a save" if copy else ""
    numbers = {"bytes_free": one.free_main, "bytes_training": one.free_main - spare[rank], "bytes_copies": copies}
    if spare[rank] < 0:
        told, remedy = f"{told}: {where.place([rank])}", "end what else runs there"
        return [Check("main memory", "warn", told, remedy, numbers)]
    if spare[rank] < copies:
        told = f"{told}: training will stand still while it saves ({where.place([rank])})"
        return [Check("main memory", "warn", told, "more memory a node, or train.async_save=false", numbers)]
    return [Check("main memory", "ok", told, "", numbers)]


# ---- limits and leftovers -------------------------------------------------------------------------------------------
def look_at_limits(where: Where) -> tuple[int, int]:
    """Open files this rank may have, and needs at most."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    peers = 0 if where.device.type == "cuda" else 3 * where.ranks_meant  # gloo joins all of a group, in each group
    # Rank 0 keeps the store the ranks meet at, three connections each; its limit is raised at start.
    allowed, need = (hard, 3 * where.ranks_meant) if where.rank == 0 else (soft, 0)
    return (2**31 if allowed == resource.RLIM_INFINITY else allowed), _OPEN_FILES + need + peers


def judge_limits(where: Where, found: list[tuple[int, int]]) -> list[Check]:
    words = {rank: [f"{limit} open files allowed, {need} needed"] for rank, (limit, need) in enumerate(found)
             if limit < need}  # fmt: skip
    if told := told_by(where, words):
        return [Check("open files", "no", told, "raise it: ulimit -n 65536 in the job's script, or limits.conf")]
    limit, need = min(found, key=lambda pair: pair[0] / pair[1])
    return [Check("open files", "ok", f"{limit:,} allowed, {need:,} needed at most")]


@dataclass(frozen=True)
class Leftovers:
    """What ended jobs have left on one machine."""

    buffers: int = 0
    buffer_bytes: int = 0
    shared_free: int = 0
    locks: tuple[str, ...] = ()  # of builds that nobody is at


def look_for_leftovers(where: Where) -> Leftovers | None:
    if not where.is_first_of_host:
        return None
    buffers = [path.stat().st_size for path in SHARED_MEMORY.glob(LEFT_BY_DEEPSPEED) if path.is_file()]
    free = shutil.disk_usage(SHARED_MEMORY).free if SHARED_MEMORY.is_dir() else 0
    return Leftovers(len(buffers), sum(buffers), free, tuple(str(path) for path in stale_locks()))


def stale_locks() -> list[Path]:
    """Locks of torch's builds of extensions that no process of this machine holds. Whoever builds has its lock open
    (torch/utils/file_baton.py)."""
    named = os.environ.get("TORCH_EXTENSIONS_DIR")
    root = Path(named) if named else Path.home() / ".cache" / "torch_extensions"
    locks = [*root.glob("*/lock"), *root.glob("*/*/lock")]  # below a folder for each Python where the root is torch's
    held = set(_open_files()) if locks else set()
    return [path for path in locks if path.resolve() not in held]


def _open_files() -> Iterator[Path]:
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            yield Path(os.readlink(link))
        except OSError:  # of another user, or closed by now
            continue


def judge_leftovers(where: Where, found: list[Leftovers | None]) -> list[Check]:
    there = {rank: one for rank, one in enumerate(found) if one is not None}
    words = {rank: [f"{one.buffers} buffer(s) of ended jobs, {gib(one.buffer_bytes)} of memory, in {SHARED_MEMORY}"]
             for rank, one in there.items() if one.buffers}  # fmt: skip
    remedies = [f"once no other job runs there: rm {SHARED_MEMORY}/{LEFT_BY_DEEPSPEED}"] if words else []
    for rank, one in there.items():
        if one.locks:
            words.setdefault(rank, []).append(
                f"lock(s) of builds that nobody is at, for which a later build waits for ever: {', '.join(one.locks)}"
            )
    if locks := sorted({lock for one in there.values() for lock in one.locks}):
        remedies.append(f"unless another machine is building: rm {' '.join(locks)}")
    if where.device.type == "cuda" and any(one.shared_free < GIB for one in there.values()):
        least = min(one.shared_free for one in there.values())
        words.setdefault(0, []).append(f"{gib(least)} free in {SHARED_MEMORY}, where NCCL keeps its buffers")
        remedies.append("give containers more (docker --shm-size=8g)")
    if told := told_by(where, words):
        return [Check("leftovers", "warn", told, "; ".join(remedies))]
    return [Check("leftovers", "ok", f"none in {SHARED_MEMORY} and among builds, on {len(there)} machine(s)")]


# ---- clocks ---------------------------------------------------------------------------------------------------------
def look_at_clock(where: Where) -> list[float]:
    """The time, three times, each just after all ranks have arrived."""
    times = []
    for _ in range(3):
        collectives.barrier()
        times.append(time.time())
    return times


def judge_clocks(where: Where, found: list[list[float]]) -> list[Check]:
    if where.num_ranks == 1:
        return []
    times = min(zip(*found), key=lambda read: max(read) - min(read))  # where the fewest ranks were kept waiting
    middle = statistics.median(times)
    away = [read - middle for read in times]
    rank = max(range(len(away)), key=lambda r: abs(away[r]))
    spread, numbers = max(times) - min(times), {"seconds_apart": max(times) - min(times)}
    told = f"at most {spread * 1e3:,.0f} ms apart"
    if spread <= _CLOCK_WARN_S:
        return [Check("clocks", "ok", told, "", numbers)]
    told = f"{spread:,.1f} s apart, {where.place([rank])} by {away[rank]:+,.1f} s"
    status: Status = "warn" if spread <= _CLOCK_NO_S else "no"
    return [Check("clocks", status, told, "let the nodes ask a time server (chronyc tracking)", numbers)]


MACHINE_STEPS = (
    Step("layout", lambda where: None, judge_layout),
    Step("software", look_at_software, judge_software),
    Step("devices", look_at_device, judge_devices),
    Step("memory", look_at_memory, judge_memory),
    Step("open files", look_at_limits, judge_limits),
    Step("leftovers", look_for_leftovers, judge_leftovers),
    Step("clocks", look_at_clock, judge_clocks),
)
