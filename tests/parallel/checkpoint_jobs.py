"""What single ranks do in the tests of checkpoints: real engines, real data, real folders."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import torch

from configs.errors import UserError
from configs.run import RunConfig
from parallel import checkpoint_store as store
from parallel import groups
from parallel.checkpoint_write import Write
from parallel.engine import Engine, StepResult
from parallel.fragments import fragment_boxes
from parallel.sharding import Placement
from pretrain.checkpoint import Checkpoints
from pretrain.data import Sampler, cut_batch
from pretrain.health import fit_to_apply
from pretrain.state import TrainState
from slurm.environ import LaunchEnv
from tests.parallel.jobs import engine_on, pieces

LR = 1e-2


class Trainee:
    """An engine with its data and checkpoints: what `build` puts together, without metrics."""

    def __init__(self, engine: Engine, config: RunConfig, folder: str) -> None:
        self.engine, self.config = engine, config.model_copy(update={"run_dir": folder})
        self.sampler = Sampler(config.data, config.train.sequence_length)
        self.checkpoints = Checkpoints(self.config, self.sampler.tokenizers)
        self.state = TrainState()

    def restore(self) -> Path | None:
        restored = self.checkpoints.restore(self.engine)
        self.state = restored.state if restored else TrainState()
        self.sampler.resume(self.state.cursor)
        return restored.folder if restored else None

    def step(self) -> StepResult:
        chosen = self.sampler.next_batch(self.config.train.batch_sequences)
        topology, size = self.engine.topology, len(chosen) // self.engine.topology.data
        windows = self.sampler.read(chosen[topology.data_rank * size : (topology.data_rank + 1) * size])
        parts = cut_batch(windows, self.config.train.micro_batch_sequences)
        batches = [(torch.from_numpy(tokens), torch.from_numpy(labels)) for tokens, labels in parts]
        result = self.engine.train_step(batches, LR, fit_to_apply)
        self.state.step += 1
        self.state.updates += result.applied
        self.state.cursor = self.sampler.cursor
        return result

    def steps(self, last: int) -> list[tuple[float, float]]:
        """Train up to step `last`; loss and norm of each."""
        figures = []
        while self.state.step < last:
            result = self.step()
            figures.append((result.cross_entropy, result.grad_norm))
        return figures

    def save(self) -> None:
        self.checkpoints.save(self.engine, self.state)


def stay_job(env: LaunchEnv, config: RunConfig, folder: str, save_at: int, steps: int) -> dict[str, Any]:
    """Train, save on the way, and go on: what the others are held against."""
    with engine_on(env, config) as engine:
        run = Trainee(engine, config, folder)
        run.steps(save_at)
        run.save()
        run.checkpoints.wait()
        facts = {"pieces": pieces(engine), "state": run.state.to_json()}
        return {**facts, "figures": run.steps(steps)}


def move_job(
    env: LaunchEnv, config: RunConfig, folders: list[str], steps: int, every: int = 1, first: int = 0
) -> list[dict[str, Any]]:
    """Load the checkpoint of each folder in turn, at this layout; from every `every`-th, go on to step `steps`."""
    found = []
    with engine_on(env, config) as engine:
        for number, folder in enumerate(folders):
            run = Trainee(engine, config, folder)
            run.restore()
            facts = {"pieces": pieces(engine), "state": run.state.to_json()}
            goes_on = (number - first) % every == 0
            found.append({**facts, "figures": run.steps(steps) if goes_on else None})
    return found


def save_beside_job(env: LaunchEnv, config: RunConfig, folder: str, hold: bool, delay_s: float) -> dict[str, Any]:
    """Save after step 2 with a copy that comes late, and train on at once; what stood at step 2, and what came out."""
    copy = Write._copy_all

    def late(self: Write) -> list[torch.Tensor]:
        time.sleep(delay_s)
        return copy(self)

    Write._copy_all = late  # type: ignore[method-assign]
    with engine_on(env, config) as engine:
        run = Trainee(engine, config, folder)
        run.steps(2)
        held = pieces(engine)
        run.save()
        if not hold:
            engine.before_update = lambda: None
        figures = run.steps(4)
        run.checkpoints.wait()
        return {"held": held, "figures": figures, "saved": run.checkpoints.poll(), "pieces": pieces(engine)}


def killed_job(env: LaunchEnv, config: RunConfig, folder: str, after_s: float, steps: int) -> None:
    """Go on from what is there, saving after every step, until the process is killed `after_s` after its first step."""

    def kill() -> None:
        time.sleep(after_s)
        os.kill(os.getpid(), signal.SIGKILL)

    with engine_on(env, config) as engine:
        run = Trainee(engine, config, folder)
        run.restore()
        while run.state.step < steps:
            run.steps(run.state.step + 1)
            run.save()
            if after_s and threading.active_count() < 99:
                threading.Thread(target=kill, daemon=True).start()
                after_s = 0.0
        run.checkpoints.wait()


def finish_job(env: LaunchEnv, config: RunConfig, folder: str, steps: int) -> dict[str, Any]:
    """Go on from what is there to the end."""
    with engine_on(env, config) as engine:
        run = Trainee(engine, config, folder)
        found = run.restore()
        begun = run.state.step
        run.steps(steps)
        return {"from": found, "begun": begun, "pieces": pieces(engine)}


def owners_job(env: LaunchEnv, config: RunConfig, folder: str) -> dict[str, Any]:
    """Two starts of one run: the older one wakes up when the newer one has taken over."""
    told: dict[str, Any] = {}
    with engine_on(env, config) as engine:
        older = Trainee(engine, config, folder)
        older.steps(1)
        older.save()
        older.checkpoints.wait()
        older.steps(2)
        newer = Trainee(engine, config, folder)
        told["newer goes on from"] = newer.restore()
        for key in ("save", "save under way"):
            if key == "save under way":  # it had begun to write when it was overtaken
                older.checkpoints._begin = lambda plan, partial: partial.mkdir()  # type: ignore[method-assign,assignment]
            try:
                older.save()
                older.checkpoints.wait()
            except UserError as error:
                told[key] = error.found
            older.checkpoints._on_disk = None
        newer.steps(2)
        newer.save()
        newer.checkpoints.wait()
    return told


def damage_job(env: LaunchEnv, config: RunConfig, folder: str, damages: int) -> list[tuple[str, str, list[str]]]:
    """Damage the newer of two checkpoints again and again; (what was done, what was restored, what was told)."""
    import shutil

    import numpy as np

    from tests.parallel.damage import spoil

    found = []
    with engine_on(env, config) as engine:
        run = Trainee(engine, config, f"{folder}/whole")
        for step in (1, 2):
            run.steps(step)
            run.save()
            run.checkpoints.wait()
        random = np.random.default_rng(7)
        for number in range(damages):
            copy = Path(f"{folder}/spoilt")
            shutil.copytree(f"{folder}/whole", copy)
            done = spoil(copy / "checkpoints" / "step-00000002", number, random)
            spoilt = Trainee(engine, config, str(copy))
            restored = spoilt.checkpoints.restore(engine)
            assert restored is not None
            told = [fault for faults in restored.damaged.values() for fault in faults]
            found.append((done, restored.folder.name, told))
            shutil.rmtree(copy)
    return found


def store_job(env: LaunchEnv, folder: str) -> None:
    """Save a tensor cut over the ranks, one that is replicated and one that only this rank has."""
    groups.start(env.rank, env.world_size, env.local_rank, env.master_addr, env.master_port, 60)
    whole = torch.arange(105.0).view(7, 5, 3)
    cuts = [*[0, 17, 60, 105][: env.world_size], 105]
    start, end = cuts[env.rank], cuts[env.rank + 1]
    tensors = {
        "cut": fragment_boxes(whole.flatten()[start:end], start, (7, 5, 3), Placement((7, 5, 3), (0, 0, 0))),
        "same": torch.arange(4),
        f"own/{env.rank}": torch.full((2,), float(env.rank)),
    }
    store.save(Path(folder), tensors, {"step": 3})
    groups.stop()


def overlapping_job(env: LaunchEnv, folder: str) -> str:
    """Ranks whose boxes overlap: what each is told."""
    groups.start(env.rank, env.world_size, env.local_rank, env.master_addr, env.master_port, 60)
    values = torch.arange(4.0) + env.rank
    try:
        store.save(Path(folder), {"x": fragment_boxes(values, env.rank * 2, (6,), Placement((6,), (0,)))}, {})
    except ValueError as error:
        groups.stop()
        return str(error)
    return "nothing"


def begin_job(env: LaunchEnv, config: RunConfig, folder: str, source: str) -> dict[str, Any]:
    """A new run that begins with another's weights."""
    with engine_on(env, config) as engine:
        run = Trainee(engine, config, folder)
        assert run.restore() is None
        run.checkpoints.start_from(engine, Path(source))
        facts = {"pieces": pieces(engine)}
        return {**facts, "figures": run.steps(1)}


def swept_job(env: LaunchEnv, config: RunConfig, folder: str) -> str:
    """A file of a save under way is removed by another hand before the commit: what is told."""
    with engine_on(env, config) as engine:
        run = Trainee(engine, config, folder)
        run.steps(1)
        run.save()
        run.checkpoints.wait()
        run.steps(2)
        collect = run.checkpoints._mailbox.collect

        def late(topic: str) -> Any:
            for file in (Path(folder) / "checkpoints").glob("*.partial-1/rank-00000-*"):
                file.unlink()
            return collect(topic)

        run.checkpoints._mailbox.collect = late  # type: ignore[method-assign]
        try:
            run.save()
            run.checkpoints.wait()
        except UserError as error:
            return error.found
    return "nothing"


def gone_job(env: LaunchEnv, config: RunConfig, folder: str) -> str:
    """The run folder is taken away between two saves: what is told."""
    with engine_on(env, config) as engine:
        run = Trainee(engine, config, folder)
        run.steps(1)
        Path(folder).rename(f"{folder}-elsewhere")
        Path(folder).mkdir()  # as a mount point stays when its disk is gone
        try:
            run.save()
            run.checkpoints.wait()
        except UserError as error:
            return error.found
    return "nothing"


def unreadable_job(env: LaunchEnv, config: RunConfig, folder: str) -> str:
    """Rank 1 may open no more files when it resumes: what each rank is told."""
    import resource

    with engine_on(env, config) as engine:
        run = Trainee(engine, config, folder)
        if env.rank == 1:
            held = [os.open("/dev/null", os.O_RDONLY) for _ in range(20)]
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(held) + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        try:
            run.restore()
        except UserError as error:
            return error.found
    return "nothing"


def thinned_job(env: LaunchEnv, config: RunConfig, folder: str) -> list[Any]:
    """Three saves, of which one is kept, while something bars the removal of the first."""
    with engine_on(env, config) as engine:
        run = Trainee(engine, config, folder)
        saved = []
        for step in (1, 2, 3):
            run.steps(step)
            run.save()
            run.checkpoints.wait()
            saved += run.checkpoints.poll()
            if step == 1:
                (Path(folder) / "checkpoints" / "step-00000001.dropped-1" / "in the way").mkdir(parents=True)
        return saved
