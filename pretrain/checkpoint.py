"""The checkpoints of a run: which are there, save, load, retention.

checkpoints/step-00000100/          complete; made by one rename
checkpoints/step-00000200.partial/  being written, or left by a run that died: never read, removed by the next save
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path

import torch
from torch import Tensor

from configs.base import differences
from configs.errors import UserError
from configs.model import ModelConfig
from configs.run import RunConfig
from parallel import checkpoint_store as store
from parallel import collectives
from parallel.checkpoint_store import CheckpointException
from parallel.engine import Engine
from pretrain.state import TrainState

_NAME = re.compile(r"step-(\d{8})")
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def complete_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, oldest first. Nothing is opened."""
    folder = run_dir / "checkpoints"
    return sorted(p for p in folder.iterdir() if _NAME.fullmatch(p.name)) if folder.is_dir() else []


def read_for_model(folder: Path, model: ModelConfig) -> store.Manifest:
    """The manifest, if the checkpoint is whole and holds this very model; else a UserError naming what differs."""
    manifest = store.Manifest.read(folder)
    stored, wanted = manifest.document.get("config", {}).get("model"), model.model_dump(mode="json")
    if stored != wanted:
        differ = differences(stored or {}, wanted, "model")
        raise UserError(
            f"{folder} holds another model: "
            + "; ".join(f"{key} is {a!r} there, {b!r} here" for key, a, b in differ[:5]),
            "a checkpoint of the model that is configured",
            "restore these keys, or choose another run_dir=... for the new model",
        )
    return manifest


class Checkpoints:
    """Saves and restores one run. All ranks call each method together."""

    def __init__(self, config: RunConfig) -> None:
        self.config, self.folder = config, Path(config.run_dir) / "checkpoints"

    def save(self, engine: Engine, state: TrainState) -> Path:
        """Write aside, then commit by one rename; older ones beyond `keep_checkpoints` go.

        Raises:
            UserError: the disk is full; nothing that was there is touched.
        """
        final = self.folder / f"step-{state.step:08d}"
        if collectives.same_on_all_ranks(final.exists()):  # stopped again without a step in between
            return final
        partial = final.with_suffix(".partial")
        if engine.topology.rank == 0:
            for left in self.folder.glob("*.partial"):
                shutil.rmtree(left)
        collectives.barrier()
        document = {"config": self.config.model_dump(mode="json"), "state": state.to_json()}
        try:
            store.save(partial, {**engine.tensors(), **_random_state(engine.topology.rank)}, document)
        except (CheckpointException, OSError) as error:
            if engine.topology.rank == 0:
                shutil.rmtree(partial, ignore_errors=True)
            raise _disk_full(error, self.folder) or error from None
        if engine.topology.rank == 0:
            os.rename(partial, final)
            _sync_folder(self.folder)
            for old in complete_checkpoints(self.folder.parent)[: -self.config.train.keep_checkpoints]:
                shutil.rmtree(old)
        collectives.barrier()
        return final

    def restore(self, engine: Engine) -> tuple[Path, TrainState] | None:
        """Load the newest checkpoint, checksums first; None where there is none."""
        found = complete_checkpoints(self.folder.parent)
        if not (newest := collectives.same_on_all_ranks(found[-1] if found else None)):
            return None
        error, manifest = None, None
        topology = engine.topology
        try:
            manifest = read_for_model(newest, self.config.model)
            store.verify(newest, topology.rank, topology.world_size)
        except UserError as met:
            error = met
        collectives.raise_together(error)
        assert manifest is not None
        state = TrainState.from_json(manifest.document["state"])
        randomness = {k: v for k, v in _random_state(topology.rank).items() if k in manifest.tensors}
        store.load(newest, {**engine.tensors(), **randomness})
        engine.loaded(state.updates)
        for value in randomness.values():
            torch.cuda.set_rng_state(value) if torch.cuda.is_available() else torch.set_rng_state(value)
        return newest, state


def load_weights(folder: Path, model: torch.nn.Module, config: ModelConfig) -> None:
    """Fill a whole, materialised model with the float32 weights of a checkpoint, on one process."""
    read_for_model(folder, config)
    parameters = dict(model.named_parameters())
    store.load(folder, {f"{name}/weight": parameter.data for name, parameter in parameters.items()})


def _random_state(rank: int) -> dict[str, Tensor]:
    """The generator behind noisy routers. A rank that was not there when it was saved keeps its own."""
    if torch.cuda.is_available():
        return {f"random_state/gpu-{rank:05d}": torch.cuda.get_rng_state()}
    return {f"random_state/rank-{rank:05d}": torch.get_rng_state()}


def _disk_full(error: BaseException, folder: Path) -> UserError | None:
    """A UserError if the failure, on whichever rank, was a disk without room."""
    causes = [failure[0] for failure in getattr(error, "failures", {}).values()] or [error]
    for cause in causes:
        code = getattr(cause, "errno", None)
        # safetensors reports the number in its text only
        if code in _DISK_FULL or any(f"(os error {number})" in str(cause) for number in _DISK_FULL):
            free = shutil.disk_usage(folder).free if folder.exists() else 0
            return UserError(
                f"no room for a checkpoint in {folder} ({free / 2**30:.2f} GiB free): {cause}",
                "room for one more checkpoint",
                "free space, raise the quota, or set run_dir=... to another disk; earlier checkpoints are untouched",
            )
    return None


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
