"""Preflight of the run folder: written by every rank, seen by every rank, roomy and quick enough for checkpoints."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

from parallel import collectives
from pretrain import budget
from pretrain.checkpoint_folders import complete_checkpoints
from pretrain.preflight_report import Check, Step, Where, gib, told_by

_PATIENCE_S = 5.0  # until a file that is there must show: network file systems look up names from memory for a while
_ALL_RANKS_WRITE = 256 * 2**20  # bytes
_LEAST, _MOST, _QUICK = 4 * 2**20, 64 * 2**20, 2**20  # bytes a rank writes
_LONG_SAVE_S = 600.0


@dataclass(frozen=True)
class Disk:
    """What one rank met. `fault`: it could not write; `unseen`: whose file it could not see."""

    free: int = 0
    fault: str = ""
    unseen: tuple[int, ...] = ()
    written: int = 0
    seconds: float = 0.0


def look_at_disk(where: Where) -> Disk:
    """Rank 0 makes a folder; every rank must see it, write into it, and rank 0 must see all they wrote."""
    run_dir = Path(where.config.run_dir)
    name: str = collectives.same_on_all_ranks(f".preflight-{time.time_ns():x}-{os.getpid()}")
    folder, new = run_dir / name, [path for path in (run_dir, *run_dir.parents) if not path.exists()]
    fault, free = "", 0
    if where.rank == 0:
        try:
            folder.mkdir(parents=True)
            free = shutil.disk_usage(folder).free
        except OSError as error:
            fault = _words(error)
    if first := collectives.same_on_all_ranks(fault):
        return Disk(fault=first)
    sees = _shows(folder, where.quick)
    collectives.barrier()  # all at once, as a save does it
    written, seconds = 0, 0.0
    if sees:  # else it is another disk, of which nothing is asked
        try:
            written, seconds = _write(folder / f"rank-{where.rank}", _bytes_to_write(where, folder))
        except OSError as error:
            fault = _words(error)
    unseen: tuple[int, ...] = () if sees else (0,)
    wrote: list[bool] = collectives.gather_on_all(sees and not fault)
    if where.rank == 0:
        made = [rank for rank, done in enumerate(wrote) if done]
        unseen += tuple(rank for rank in made if not _shows(folder / f"rank-{rank}", where.quick))
        _clear_away(folder, new)
    return Disk(free, fault, unseen, written, seconds)


def _bytes_to_write(where: Where, folder: Path) -> int:
    size = _QUICK if where.quick else min(_MOST, max(_LEAST, _ALL_RANKS_WRITE // where.num_ranks))
    return size if shutil.disk_usage(folder).free > 4 * size * where.num_ranks else 4096


def _write(path: Path, size: int) -> tuple[int, float]:
    block = os.urandom(min(size, 2**20))  # a disk that compresses gains nothing
    began = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(max(1, size // len(block))):
            if file.write(block) < len(block):
                raise OSError(28, "No space left on device", str(path))
        os.fsync(file.fileno())
    return size, time.perf_counter() - began


def _shows(path: Path, quick: bool) -> bool:
    deadline = time.monotonic() + (_PATIENCE_S / 2 if quick else _PATIENCE_S)
    while not os.path.exists(path):  # Path.exists raises where a folder above cannot be looked into
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _clear_away(folder: Path, new: list[Path]) -> None:
    """Leave the disk as it was, up to the folders that were made on the way."""
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        for path in new:
            path.rmdir()


def _words(error: OSError) -> str:
    return f"{error.strerror or error}: {error.filename}" if error.filename else str(error)


# ---- judging --------------------------------------------------------------------------------------------------------
def judge_disk(where: Where, found: list[Disk]) -> list[Check]:
    run_dir = where.config.run_dir
    checks = [_judge_folder(where, found)]
    if found[0].fault:
        return checks
    return [*checks, _judge_room(where, found[0].free), *_judge_speed(where, run_dir, found)]


def _judge_folder(where: Where, found: list[Disk]) -> Check:
    name, run_dir = "run folder", Path(where.config.run_dir).absolute()
    apart = [rank for rank, one in enumerate(found) if rank and one.unseen]
    apart += [rank for rank in found[0].unseen if rank not in apart]
    if apart:
        told = f"{run_dir} is not one folder for all: {where.place(apart)} and rank 0 do not see each other's files"
        return Check(name, "no", told, "set run_dir=... to a folder on a disk that all nodes share")
    faults = {rank: [one.fault] for rank, one in enumerate(found) if one.fault}
    if found[0].fault:  # told to all by rank 0
        faults = {0: faults[0]}
    if faults:
        told = told_by(where, faults)
        return Check(name, "no", told, "mend its permissions or free space, or set run_dir=... to another")
    seen = f", seen by all {where.num_ranks} ranks" if where.num_ranks > 1 else ""
    return Check(name, "ok", f"{run_dir} can be written{seen}")


def _judge_room(where: Where, free: int) -> Check:
    config, name = where.config, "room for checkpoints"
    one, train = budget.checkpoint_bytes(config.model), config.train
    there = len(complete_checkpoints(Path(config.run_dir)))
    for_good = train.steps // train.keep_every_steps if train.keep_every_steps else 0
    wanted = max(1, train.keep_checkpoints + 1 + for_good - there)
    told = f"{gib(free)} free, a checkpoint takes {gib(one)}, {wanted} may come"
    told += f" ({there} there)" if there else ""
    numbers = {"bytes_free": free, "bytes_of_a_checkpoint": one, "checkpoints_to_come": wanted}
    remedy = "free space, set run_dir=... to a larger disk, or lower train.keep_checkpoints"
    if free < one:
        return Check(name, "no", told, remedy, numbers)
    return Check(name, "warn" if free < wanted * one else "ok", told, remedy if free < wanted * one else "", numbers)


def _judge_speed(where: Where, run_dir: str, found: list[Disk]) -> list[Check]:
    wrote = [(one.seconds, rank) for rank, one in enumerate(found) if one.written >= _QUICK]
    if len(wrote) < len(found):
        return []
    slowest, rank = max(wrote)
    speed = sum(one.written for one in found) / slowest
    save_s = budget.checkpoint_bytes(where.config.model) / speed
    each = gib(found[0].written)
    so_few = "" if where.is_whole else " from so few"
    told = f"{gib(speed)}/s, {where.num_ranks} rank(s) writing {each} each: a save{so_few} takes about {save_s:,.1f} s"
    numbers = {"bytes_per_s": speed, "seconds_of_a_save": save_s, "slowest_rank": rank}
    if save_s > _LONG_SAVE_S and where.is_whole:
        remedy = f"a faster disk, or a larger train.save_every_steps; slowest was {where.place([rank])}"
        return [Check("disk speed", "warn", told, remedy, numbers)]
    return [Check("disk speed", "ok", told, "", numbers)]


DISK_STEPS = (Step("run folder", look_at_disk, judge_disk),)
