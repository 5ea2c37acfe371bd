"""What the ranks of `benchmarks.checkpoint` do."""

from __future__ import annotations

import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from benchmarks import report
from benchmarks.timing import _status_bytes
from configs.run import PRESETS, RunConfig
from parallel import checkpoint_store as store
from parallel import collectives, groups
from parallel.checkpoint_files import CHUNK_BYTES, verify
from parallel.checkpoint_manifest import Manifest
from parallel.checkpoint_plan import make_plan
from parallel.checkpoint_write import Write
from parallel.engine import Engine
from parallel.mailbox import Mailbox
from pretrain.build import make_topology, materialise
from pretrain.checkpoint import Checkpoints
from pretrain.health import fit_to_apply
from pretrain.parity_ranks import micro_batches
from pretrain.state import TrainState
from slurm.environ import LaunchEnv

TENSORS = 24  # a rank


# ---- bandwidth ------------------------------------------------------------------------------------------------------
def bandwidth_job(env: LaunchEnv, scratch: str, num_bytes: int, rounds: int) -> dict[str, list[float]]:
    """One rank: seconds of each candidate in each round, from barrier to barrier."""
    groups.start(env.rank, env.world_size, env.local_rank, env.master_addr, env.master_port, 600)
    warnings.filterwarnings("ignore")
    folder = Path(scratch)
    each = num_bytes // TENSORS // 4
    state = {f"rank{env.rank}.{n}": torch.randn(each) for n in range(TENSORS)}
    back = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    plan, mailbox = make_plan(state), Mailbox("benchmark")
    bare, ours, theirs = folder / f"bare-{env.rank}", folder / "ours", folder / "dcp"

    def save_ours() -> None:
        write = Write(plan, ours, state, {}, mailbox)
        write.run()
        write.raise_error()
        collectives.barrier()

    candidates: list[tuple[str, Callable[[], object], list[Path]]] = [
        ("write: bare disk", lambda: _write_bare(bare, state), []),
        ("write: ours", save_ours, []),
        ("write: DCP", lambda: dcp.save(dict(state), checkpoint_id=str(theirs)), []),
        ("read: bare disk", lambda: _read_bare(bare), [bare]),
        ("read: ours", lambda: store.load(ours, back), [ours]),
        ("read: ours, verified first", lambda: (_verify(ours, env), store.load(ours, back)), [ours]),
        ("read: DCP", lambda: dcp.load(dict(back), checkpoint_id=str(theirs)), [theirs]),
    ]
    seconds: dict[str, list[float]] = {name: [] for name, *_ in candidates}
    for _ in range(rounds + 1):  # the first warms up
        for name, act, read in candidates:
            for path in read:
                _forget(path)
            collectives.barrier()
            if name.startswith("write") and env.rank == 0:
                for left in {"write: ours": [ours], "write: DCP": [theirs]}.get(name, []):
                    shutil.rmtree(left, ignore_errors=True)
                    left.mkdir()
            collectives.barrier()
            began = time.perf_counter()
            act()
            collectives.barrier()
            seconds[name].append(time.perf_counter() - began)
    assert all(torch.equal(state[name], back[name]) for name in state)
    bare.unlink()
    groups.stop()
    return {name: found[1:] for name, found in seconds.items()}


def _write_bare(path: Path, state: dict[str, torch.Tensor]) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT)
    for tensor in state.values():
        data = tensor.view(torch.uint8).numpy().data
        while data:
            data = data[os.write(descriptor, data[:CHUNK_BYTES]) :]
    os.fsync(descriptor)
    os.close(descriptor)


def _read_bare(path: Path) -> None:
    buffer = bytearray(CHUNK_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _verify(folder: Path, env: LaunchEnv) -> None:
    assert verify(folder, Manifest.read(folder), env.rank, env.world_size) == []
    collectives.barrier()


def _forget(path: Path) -> None:
    """Take files out of the page cache."""
    for file in [path] if path.is_file() else path.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


# ---- beside training ------------------------------------------------------------------------------------------------
def beside_job(env: LaunchEnv, scratch: str, width: int, repeats: int) -> list[dict[str, report.Figure]]:
    """One rank that trains a model of this width, saves at once, and saves beside its steps."""
    config = _model_of(width)
    device = groups.start(env.rank, env.world_size, env.local_rank, env.master_addr, env.master_port, 600)
    topology = make_topology(config, env)
    engine = Engine(materialise(config, topology, groups.create(topology, True), device), config, device)
    batches = micro_batches(config, topology, 0)

    def step() -> float:
        began = time.perf_counter()
        engine.train_step(batches, 1e-4, fit_to_apply)
        return time.perf_counter() - began

    step()
    usual = statistics.median(step() for _ in range(3))
    rows: list[dict[str, report.Figure]] = []
    synchronous = 0.0
    for beside in (False, True):
        train = config.train.model_copy(update={"async_save": beside, "keep_checkpoints": 1})
        run = config.model_copy(update={"train": train, "run_dir": f"{scratch}/run-{width}-{beside}"})
        checkpoints, found, slowed = Checkpoints(run), list[Any](), list[float]()
        extra = 0
        for number in range(repeats + 1):
            Path("/proc/self/clear_refs").write_text("5")
            before = _status_bytes("VmRSS")
            checkpoints.save(engine, TrainState(step=number + 1))
            taken, steps = 0.0, 0
            while not (saved := checkpoints.poll()):
                taken, steps = taken + step(), steps + 1
            # The copy's pages are new to the process in the first round only.
            extra = max(extra, _status_bytes("VmHWM") - before)
            if number:
                found += saved
                slowed.append(saved[0].stall_s if not beside else taken - steps * usual)
        seconds = statistics.median(s.seconds for s in found)
        synchronous = synchronous or seconds
        stall = statistics.median(s.stall_s for s in found)
        rows.append({
            "case": f"step of {usual:.2f} s, state of {found[0].bytes / 1e6:.0f} MB",
            "candidate": "beside training" if beside else "at once",
            "seconds": seconds, "mb_per_s": found[0].bytes / seconds / 1e6, "stall_s": stall,
            "stall_ratio": stall / synchronous, "peak_mb": report.megabytes(extra),
            "note": f"slowed {statistics.median(slowed):.2f} s, copy {found[0].copied_bytes / 1e6:.0f} MB",
        })  # fmt: skip
        shutil.rmtree(run.run_dir)
    groups.stop()
    return rows


def _model_of(width: int) -> RunConfig:
    sizes = [f"model.width={width}", f"model.ffn.width={3 * width}", f"model.moe.expert.width={3 * width}"]
    few = ["train.batch_tokens=1024", "train.micro_batch_sequences=4"] if width > 32 else ["train.batch_tokens=1024"]
    return RunConfig.load(PRESETS / "demo.yaml", ["parallel.expert=1", *sizes, *few])
