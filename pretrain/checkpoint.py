"""The checkpoints of one run: saved beside training, committed, thinned out; verified and restored."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from configs.errors import DiskRefused, UserError
from configs.model import ModelConfig
from configs.run import RunConfig
from parallel import checkpoint_store as store
from parallel import collectives
from parallel.checkpoint_files import verify
from parallel.checkpoint_manifest import Damaged, Manifest
from parallel.checkpoint_plan import Plan, Tensors, bytes_to_write, make_plan
from parallel.checkpoint_write import Write, sync_folder, write_refused
from parallel.engine import Engine
from parallel.mailbox import Mailbox
from parallel.topology import Topology
from pretrain.checkpoint_checks import (
    no_sound_checkpoint,
    read_for_model,
    read_for_run,
    read_for_start,
    weights_only,
)
from pretrain.checkpoint_folders import (
    CHECKPOINTS,
    checkpoint_name,
    complete_checkpoints,
    find_checkpoint,
    remove_leftovers,
    step_of,
    to_be_dropped,
)
from pretrain.incarnation import Incarnation
from pretrain.machine import free_main_memory
from pretrain.state import TrainState

_ROOM_FOR_INDEX = 1.02  # heads of files and the manifest, beside the tensors' own bytes
_SPARE_MEMORY = 1.25  # of what a snapshot takes, to be free for it


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was committed.

    Attributes:
        bytes: of tensors, all ranks together.
        seconds: from the call to the commit.
        stall_s: of these, how long training stood still for it.
        copied_bytes: memory the snapshot of rank 0 took meanwhile.
    """

    folder: Path
    step: int
    bytes: int
    seconds: float
    stall_s: float
    copied_bytes: int


@dataclass(frozen=True)
class Restored:
    """What a run goes on from.

    Attributes:
        bytes: of tensors read by this rank.
        damaged: newer checkpoints that were passed over -> what was wrong with each.
    """

    folder: Path
    state: TrainState
    bytes: int
    verify_s: float
    load_s: float
    damaged: dict[Path, list[str]]


class _Saving:
    """A save under way."""

    def __init__(self, write: Write, partial: Path, final: Path, step: int, began: float) -> None:
        self.write, self.partial, self.final, self.step, self.began = write, partial, final, step, began
        self.stall_s = 0.0


class Checkpoints:
    """Saves and restores one run. All ranks call each method together, `poll` excepted.

    Args:
        tokenizers: sha256 of each data source's, kept in each checkpoint.
        local_world_size: ranks that share this machine's memory.
    """

    def __init__(
        self, config: RunConfig, tokenizers: Mapping[str, str | None] | None = None, local_world_size: int = 1
    ) -> None:
        self.config, self.tokenizers, self.local_world_size = config, dict(tokenizers or {}), local_world_size
        self.run_dir = Path(config.run_dir)
        self.folder = self.run_dir / CHECKPOINTS
        self.rank, self.world_size = collectives.rank_and_world()
        self._last_fit_step = 0  # of the newest state that was saved
        self._on_disk: int | None = None  # step of the newest state that is on the disk or on its way
        self._plan: Plan | None = None
        self._saving: _Saving | None = None
        self._mailbox = Mailbox("checkpoint")
        self._committed: list[Saved] = []
        error, taken = None, None
        try:
            if self.rank == 0:
                taken = Incarnation.take(self.run_dir, self.world_size)
                remove_leftovers(self.run_dir, taken.number)
        except UserError as met:
            error = met
        collectives.raise_together(error)
        self.incarnation: Incarnation = collectives.same_on_all_ranks(taken)

    # ---- saving -----------------------------------------------------------------------------------------------------
    def save(self, engine: Engine, state: TrainState) -> None:
        """Begin to write a checkpoint; with `train.async_save` training may go on at once. `poll` tells of the end.

        Raises:
            UserError: no room on the disk, the run was taken over by a newer start, or the save before this one
                failed. Earlier checkpoints are untouched.
        """
        if self._on_disk == state.step:  # stopped again without a step in between
            return
        began = time.perf_counter()
        self.wait()
        tensors: Tensors = {**engine.tensors(), **_random_state(engine.topology)}
        self._plan = plan = self._plan or make_plan(tensors)
        self._last_fit_step = state.last_fit_step
        final = self.folder / checkpoint_name(state.step)
        partial = self._aside(final, "partial")
        refusal = self._begin(plan, partial) if self.rank == 0 else None
        answers = collectives.gather_on_all((refusal, self._copy_fits(tensors, plan)))
        if first := next((met for met, _ in answers if met), None):
            raise first
        document = {
            "config": self.config.model_dump(mode="json"),
            "state": state.to_json(),
            "layout": engine.topology.degrees(),
            "tokenizers": self.tokenizers,
            "saved": {"time": time.time(), "start": self.incarnation.number, "torch": str(torch.__version__)},
        }
        write = Write(plan, partial, tensors, document, self._mailbox, lambda: self._commit(partial, final))
        self._saving = saving = _Saving(write, partial, final, state.step, began)
        self._on_disk = state.step
        if self.config.train.async_save and all(fits for _, fits in answers):
            engine.before_update = lambda: _wait_until_copied(saving)
            write.start()
            saving.stall_s += time.perf_counter() - began
        else:
            write.run()
            saving.stall_s += time.perf_counter() - began
            self.wait()

    def poll(self) -> list[Saved]:
        """Checkpoints committed since this was asked last; on rank 0, others do not know.

        Raises:
            UserError: one could not be written.
        """
        if self._saving is not None and self._saving.write.done:
            saving, self._saving = self._saving, None
            self._close(saving)
            saving.write.raise_error()
        found, self._committed = self._committed, []
        return found

    def wait(self) -> None:
        """Until the save under way, if any, is over on all ranks. Raises as `poll` does, on all ranks together."""
        if self._saving is None and self.world_size == 1:
            return
        saving, self._saving = self._saving, None
        if saving is not None:
            saving.write.join()
            self._close(saving)
        error = saving.write.error if saving else None
        collectives.raise_together(error if isinstance(error, UserError) else None)
        if error is not None:
            raise error

    def _close(self, saving: _Saving) -> None:
        """After the thread has ended."""
        if self.rank != 0:
            return
        if saving.write.error is None:
            seconds, copied = saving.write.ended - saving.began, saving.write.copied_bytes
            total = saving.write.plan.total_bytes
            self._committed.append(Saved(saving.final, saving.step, total, seconds, saving.stall_s, copied))
        else:  # all ranks have sent their message: none is writing any more
            shutil.rmtree(saving.partial, ignore_errors=True)

    def linger(self, seconds: float) -> None:
        """After a failure: let a save whose copy was taken come to its end, if it does so soon."""
        if self._saving is not None:
            self._saving.write.join(seconds)

    def _copy_fits(self, tensors: Tensors, plan: Plan) -> bool:
        """Whether main memory holds a copy of what the ranks of this machine write, if all write as much as this."""
        copies = bytes_to_write(tensors, plan) * self.local_world_size
        return copies * _SPARE_MEMORY < free_main_memory()

    def _begin(self, plan: Plan, partial: Path) -> UserError | None:
        """Make the folder, or say what speaks against a save; on rank 0."""
        need = round(plan.total_bytes * _ROOM_FOR_INDEX) + 2**16
        try:
            self.incarnation.check()
            self.folder.mkdir(exist_ok=True)  # not its parents: without a disk below them they must not come back
            if need > shutil.disk_usage(self.folder).free:
                self._thin_out()  # `keep_checkpoints` may have become smaller
            free = shutil.disk_usage(self.folder).free
            if need <= free:
                partial.mkdir()
                return None
        except UserError as error:
            return error
        except OSError as error:
            return write_refused(error, self.folder)
        return DiskRefused(
            f"no room for a checkpoint in {self.folder}: {free / 2**30:.2f} GiB free",
            f"{need / 2**30:.2f} GiB",
            "free space, or set run_dir=... to another disk; nothing was written, earlier checkpoints are untouched",
        )

    def _commit(self, partial: Path, final: Path) -> None:
        """On rank 0, once all is flushed: one rename, to a name that nothing bears; then retention."""
        self.incarnation.check()
        if final.exists():
            before = Manifest.read(final, sizes=False).document.get("saved", {}).get("start", 0)
            if before >= self.incarnation.number:
                self.incarnation.check()
                raise UserError(f"{final} is there, by start {before}", "a step that was not saved yet", "start again")
            final.rename(self._aside(final, "before"))  # by an older start that was thought dead
        os.rename(partial, final)
        sync_folder(self.folder)
        with contextlib.suppress(OSError):  # what cannot be removed now does not make the new one unwritten
            self._thin_out()

    def _thin_out(self) -> None:
        train, found = self.config.train, complete_checkpoints(self.run_dir)
        for old in to_be_dropped(found, train.keep_checkpoints, train.keep_every_steps):
            # Of those a rollback could go to, the newest stays.
            if old != max((p for p in found if step_of(p) <= self._last_fit_step), default=None):
                self._drop(old)

    def _drop(self, folder: Path) -> None:
        self.incarnation.check()  # a newer start may be reading it
        aside = self._aside(folder, "dropped")
        folder.rename(aside)  # a name means whole, also when this process ends half-way
        shutil.rmtree(aside, ignore_errors=True)

    def _aside(self, folder: Path, why: str) -> Path:
        return folder.with_name(f"{folder.name}.{why}-{self.incarnation.number}")

    # ---- restoring --------------------------------------------------------------------------------------------------
    def restore(self, engine: Engine, last_step: int | None = None) -> Restored | None:
        """Load the newest checkpoint whose every byte is as it was written; None where there is none at all.

        Args:
            last_step: look at none of a later step.

        Raises:
            UserError: all are damaged, or one is of another model, tokenizer, program or version.
        """
        topology, damaged = engine.topology, dict[Path, list[str]]()
        found = complete_checkpoints(self.run_dir)[::-1] if self.rank == 0 else []
        found = [folder for folder in found if last_step is None or step_of(folder) <= last_step]
        for folder in collectives.same_on_all_ranks(found):
            began = time.perf_counter()
            manifest, faults = self._examine(folder)
            if manifest is None:
                damaged[folder] = faults
                continue
            verified = time.perf_counter()
            state = TrainState.from_json(manifest.document["state"])
            randomness = {k: v for k, v in _random_state(topology).items() if k in manifest.tensors}
            size = store.load(folder, {**engine.tensors(), **randomness}, manifest)
            engine.loaded(state.updates)
            for value in randomness.values():
                torch.cuda.set_rng_state(value) if torch.cuda.is_available() else torch.set_rng_state(value)
            self._on_disk = state.step
            self._set_aside(damaged)
            return Restored(folder, state, size, verified - began, time.perf_counter() - verified, damaged)
        if damaged:
            raise no_sound_checkpoint(self.folder, damaged)
        return None

    def go_back(self, engine: Engine, last_step: int) -> Restored | None:
        """In the middle of a run: restore the newest sound checkpoint of `last_step` or before, and remove the later
        ones, in whose place others are to come. Raises as `restore` does; then nothing was removed."""
        self.wait()
        restored, error = self.restore(engine, last_step), None
        if restored is None:
            return None
        if self.rank == 0:
            try:
                # The newest first: whatever is left when this process ends half-way leads here again.
                for folder in complete_checkpoints(self.run_dir)[::-1]:
                    if step_of(folder) > restored.state.step:
                        self._drop(folder)
            except UserError as met:
                error = met
            except OSError as met:
                error = write_refused(met, self.folder)
        collectives.raise_together(error)
        return restored

    def start_from(self, engine: Engine, path: Path) -> Path:
        """Begin with the weights of another checkpoint, of any layout; the optimizer starts afresh.

        Args:
            path: a checkpoint, or a run whose newest is meant.
        """
        folder: Path = collectives.same_on_all_ranks(find_checkpoint(path))
        names = [name for name, _ in engine.model.named_parameters()]
        manifest = weights_only(read_for_start(folder, self.config.model, names))
        faults = collectives.gather_on_all([str(f) for f in verify(folder, manifest, self.rank, self.world_size)])
        if found := [fault for mine in faults for fault in mine]:
            raise UserError(f"train.start_from={folder}: {found[0]}", "bytes as they were written", "copy it again")
        weights = {name: boxes for name, boxes in engine.tensors().items() if name.endswith("/weight")}
        store.load(folder, weights, manifest)
        engine.loaded(updates=0)
        return folder

    def _examine(self, folder: Path) -> tuple[Manifest | None, list[str]]:
        """The manifest of a sound checkpoint, or what is wrong with it: all ranks share the work and the answer."""
        error, manifest, mine = None, None, list[str]()
        try:
            manifest = read_for_run(folder, self.config.model, self.tokenizers)
            mine = [str(fault) for fault in verify(folder, manifest, self.rank, self.world_size)]
        except Damaged as met:
            mine = [met.found]
        except UserError as met:
            error = met
        collectives.raise_together(error)
        faults = [fault for found in collectives.gather_on_all(mine) for fault in found]
        return (manifest if not faults else None), list(dict.fromkeys(faults))

    def _set_aside(self, damaged: dict[Path, list[str]]) -> None:
        """Give checkpoints that were passed over another name, so that a save of the same step finds its place."""
        error = None
        if self.rank == 0:
            try:
                for folder in damaged:
                    self.incarnation.check()
                    folder.rename(self._aside(folder, "damaged"))
            except UserError as met:
                error = met
            except OSError as met:
                error = write_refused(met, self.folder)
        collectives.raise_together(error)


def load_weights(folder: Path, model: torch.nn.Module, config: ModelConfig) -> None:
    """Fill a whole, materialised model with the float32 weights of a checkpoint, on one process."""
    manifest = read_for_model(folder, config)
    parameters = dict(model.named_parameters())
    store.load(folder, {f"{name}/weight": parameter.data for name, parameter in parameters.items()}, manifest)


def _wait_until_copied(saving: _Saving) -> None:
    """Before an update: the snapshot must have been taken."""
    began = time.perf_counter()
    saving.write.wait_until_copied()
    saving.stall_s += time.perf_counter() - began


def _random_state(topology: Topology) -> dict[str, Tensor]:
    """The generator behind noisy routers. Named by what it was seeded by: tensor and context ranks share sequences, and
    must go on to draw the same noise at any layout. A place that was not there when it was saved keeps its own."""
    place = f"stage-{topology.stage}-data-{topology.data_rank}"
    if torch.cuda.is_available():
        return {f"random_state/gpu-{place}": torch.cuda.get_rng_state()}
    return {f"random_state/cpu-{place}": torch.get_rng_state()}
