"""The only place that constructs. The order of `build` is the order in which a run comes to be."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch

from configs.errors import UserError
from configs.layout import least_micro_batches
from configs.run import RunConfig
from model.glam import GLaM
from model.init import initial_value
from parallel import collectives, groups
from parallel.context import split_sequences
from parallel.engine import Engine
from parallel.expert import spread_experts
from parallel.failures import GRACE_S, working_together
from parallel.part import Part
from parallel.sharding import cut
from parallel.tensor import split_tensors
from parallel.topology import Topology
from parallel.watch import Watch, WatchSettings
from pretrain import budget
from pretrain.checkpoint import Checkpoints, Restored
from pretrain.checkpoint_checks import read_for_start, read_newest_readable
from pretrain.checkpoint_folders import CHECKPOINTS, complete_checkpoints, find_checkpoint
from pretrain.data import HeldOut, Sampler, check_document_end, check_vocabulary
from pretrain.machine import keep_freed_memory, refuse_if_too_small
from pretrain.metrics import Metrics
from pretrain.state import TrainState
from pretrain.status import FOLDER, STOP, RankStatus, unmark_done
from pretrain.stop_signals import StopRequest
from slurm.environ import LaunchEnv, submitted


@dataclass
class Run:
    """Everything the loop needs."""

    config: RunConfig
    engine: Engine
    sampler: Sampler
    heldout: HeldOut | None
    heldout_bytes: int | None
    checkpoints: Checkpoints
    state: TrainState
    restored: Restored | None
    started_from: Path | None  # whose weights a new run began with
    metrics: Metrics | None  # on rank 0
    stop: StopRequest
    watch: Watch
    status: RankStatus
    start_seconds: dict[str, float] = field(default_factory=dict)  # parts of the start, for the log

    def say(self, message: str) -> None:
        if self.metrics:
            self.metrics.say(message)


class _Clock:
    """Seconds each part of the start took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def mark(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part], self._last = now - self._last, now


@contextmanager
def build(config: RunConfig, env: LaunchEnv) -> Iterator[Run]:
    """Construct a run and take it down again.

    Raises:
        UserError: anything about configuration, machine, data or checkpoints is unfit, on whichever rank; before any
            process group is made wherever it can be known by then.
        RankFailed: something failed later, here or on another rank; it has been said.
    """
    clock = _Clock()
    run_dir = Path(config.run_dir)
    stop = StopRequest().listen()
    refuse_if_too_small(config, env.world_size, env.local_world_size)
    topology = make_topology(config, env)
    _share_cores(env)
    keep_freed_memory()
    fault, ahead = look_ahead(config, topology)
    clock.mark("data")

    device = meet(config, env, fault)
    assert ahead is not None
    sampler, heldout = ahead
    status = RankStatus(run_dir, env.rank)
    watching = WatchSettings(config.cluster.watchdog_s, config.cluster.silent_s, run_dir / FOLDER)
    with working_together(
        env.rank, env.world_size, watching, lambda e: status.write("failed", e.cause, e.detail)
    ) as watch:
        if config.cluster.preflight != "off" and not collectives.same_on_all_ranks(complete_checkpoints(run_dir)):
            refuse_if_unfit(config, topology, device, env.local_world_size)
            clock.mark("preflight")
        engine = make_engine(config, topology, device, watch, clock)
        checkpoints = Checkpoints(config, sampler.tokenizers, env.local_world_size)
        restored, started_from = checkpoints.restore(engine), None
        if restored is None and config.train.start_from:
            started_from = checkpoints.start_from(engine, Path(config.train.start_from))
        state = restored.state if restored else TrainState()
        sampler.resume(state.cursor)
        clock.mark("checkpoint")
        heldout_bytes = heldout.text_bytes() if heldout and topology.rank == 0 else None
        status.start, status.step = checkpoints.incarnation.number, state.step
        status.write("running")
        if topology.rank == 0:
            _take_up_markers(run_dir, stop, env, ended=state.step >= config.train.steps)
        with (
            make_metrics(config, run_dir, state.step, status.start) if topology.rank == 0 else nullcontext() as metrics
        ):
            clock.mark("metrics")
            made = (engine, sampler, heldout, heldout_bytes, checkpoints, state, restored, started_from, metrics)
            try:
                yield Run(config, *made, stop, watch, status, clock.seconds)
            except Exception:
                status.step = state.step
                checkpoints.linger(GRACE_S / 2)
                raise


def refuse_if_unfit(config: RunConfig, topology: Topology, device: torch.device, local_world_size: int) -> None:
    """Before the first step of a new run: what would end it later, told now and all at once."""
    from pretrain.preflight import preflight_on_ranks

    report = preflight_on_ranks(config, topology, device, local_world_size, quick=config.cluster.preflight == "quick")
    if refusal := report.refusal():
        raise refusal


def make_engine(config: RunConfig, topology: Topology, device: torch.device, watch: Watch, clock: _Clock) -> Engine:
    """Process groups, this rank's part of the model, and the engine over them."""
    process_groups = groups.create(topology, budget.stages(config).ends_apart and config.model.tied_embedding)
    clock.mark("process groups")
    part = materialise(config, topology, process_groups, device)
    gc.freeze()  # DeepSpeed collects garbage eight times an engine, 0.2 s each; what was imported by now is none
    clock.mark("model")
    engine = Engine(part, config, device)
    engine.progress = watch.progress
    clock.mark("engine")
    return engine


def _take_up_markers(run_dir: Path, stop: StopRequest, env: LaunchEnv, ended: bool) -> None:
    """Files by which a run is steered from outside, on rank 0."""
    if not ended:
        unmark_done(run_dir)
    if env.launcher != "srun" and not submitted():  # started by hand; a job that comes back by itself must obey
        (run_dir / STOP).unlink(missing_ok=True)
    stop.watch_for(run_dir / STOP)


def make_topology(config: RunConfig, env: LaunchEnv) -> Topology:
    """The layout on the ranks that are there."""
    p = config.parallel
    data = p.data_degree(env.world_size)
    cut_experts = p.expert_tensor and p.tensor > 1
    return Topology(env.rank, data, p.tensor, p.pipeline, p.expert, cut_experts, p.sequence, p.context)


def materialise(config: RunConfig, topology: Topology, process_groups: groups.Groups, device: torch.device) -> Part:
    """The model with this rank's parameters filled in, each drawn from its name; nothing larger is ever allocated."""
    with torch.device("meta"):
        model = GLaM(config.model)
    whole = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    part = Part(model, cut(model, topology), topology, budget.stages(config), process_groups)
    for prefix, module in part.local_modules():
        module.to_empty(device=device)
        for leaf, parameter in module.named_parameters():
            name = f"{prefix}.{leaf}"
            offset = part.placements[name].offset
            drawn = initial_value(name, whole[name], config.model, config.train.seed, offset, tuple(parameter.shape))
            parameter.data.copy_(drawn)
    if process_groups.tensor is not None:
        split_tensors(part, process_groups.tensor)
    if process_groups.context is not None:
        split_sequences(part, process_groups.context)
    if topology.experts_have_groups and process_groups.expert is not None:
        name = groups.expert_group_name(topology)
        spread_experts(part.local_blocks().values(), process_groups.expert, name)
    # It feeds the noise of noisy routers. Ranks that see other tokens or layers draw other noise, on purpose; those
    # that share sequences (tensor and context ranks) must draw the same.
    torch.manual_seed(config.train.seed * 1_000_003 + topology.stage * topology.data + topology.data_rank)
    return part


def look_ahead(config: RunConfig, topology: Topology) -> tuple[UserError | None, tuple[Sampler, HeldOut | None] | None]:
    """All that can be known before ranks meet: what speaks against the run on this machine, or its data."""
    try:
        refuse_kernel_without_gpu(config)
        opened = open_data(config, topology)
        run_dir = Path(config.run_dir)
        refuse_unwritable(run_dir, "run_dir")
        refuse_unwritable(run_dir / CHECKPOINTS, "checkpoints in run_dir")
        read_newest_readable(run_dir, config.model, opened[0].tokenizers)
        if config.train.start_from:
            refuse_unfit_start(config)
    except UserError as error:
        return error, None
    return None, opened


def meet(config: RunConfig, env: LaunchEnv, fault: UserError | None = None) -> torch.device:
    """Join the other ranks, all of which must bring this configuration and no fault."""
    return groups.start(
        env.rank,
        env.world_size,
        env.local_rank,
        env.master_addr,
        env.master_port,
        config.cluster.collective_timeout_s,
        config.model_dump(mode="json"),
        fault,
    )


def open_data(config: RunConfig, topology: Topology) -> tuple[Sampler, HeldOut | None]:
    """Training and held-out data, checked against the model's vocabulary and the layout."""
    sampler = Sampler(config.data, config.train.sequence_length)
    check_vocabulary(sampler.vocab_sizes, config.model.vocab_size)
    check_document_end(sampler.document_ends, config.model.attention.document_end)
    per_pass = topology.data * config.train.micro_batch_sequences
    return sampler, make_heldout(config, per_pass, least_micro_batches(config))


def make_heldout(config: RunConfig, multiple: int = 1, least: int = 1) -> HeldOut | None:
    """The held-out windows; a multiple of `multiple` of them, and no fewer than `least` times that."""
    t = config.train
    if not config.data.heldout:
        return None
    heldout = HeldOut(config.data.heldout, t.sequence_length, t.eval_sequences, multiple, least)
    sizes = {s.name: s.stream.vocab_size for s in heldout.sources}
    check_vocabulary(sizes, config.model.vocab_size)
    return heldout


def refuse_unfit_start(config: RunConfig) -> None:
    """Weights to begin with that cannot become this model's."""
    assert config.train.start_from is not None
    with torch.device("meta"):
        names = [name for name, _ in GLaM(config.model).named_parameters()]
    read_for_start(find_checkpoint(Path(config.train.start_from)), config.model, names)


def refuse_kernel_without_gpu(config: RunConfig) -> None:
    sparse = config.model.attention.sparse
    if sparse and sparse.kernel == "flex" and not torch.cuda.is_available():
        raise UserError(
            "model.attention.sparse.kernel=flex, and no GPU is here",
            "a GPU: FlexAttention has no backward pass elsewhere",
            "set model.attention.sparse.kernel=auto, which takes flex where it can",
        )


def refuse_unwritable(folder: Path, what: str) -> None:
    """Said before the ranks meet, as later only rank 0 would notice."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UserError(
            f"{what}={folder}: {there} is no folder that can be written",
            "a folder, or a place for one",
            "mend its permissions, or set run_dir=... to another",
        )


def make_metrics(config: RunConfig, run_dir: Path, from_step: int, start: int) -> Metrics:
    """Open the run folder: its configuration, and the sinks."""
    metrics = Metrics(run_dir, from_step, config.train.steps, start=start)
    (run_dir / "config.yaml").write_text(config.dump(), encoding="utf-8")
    return metrics


def _share_cores(env: LaunchEnv) -> None:
    """Without a word from the user, torch would give every rank of a machine all its cores."""
    cores = torch.get_num_threads()
    torch.set_num_threads(max(1, cores // env.local_world_size))
