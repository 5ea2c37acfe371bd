"""Process groups: start, the groups of tensor, context and expert parallelism, the end."""

from __future__ import annotations

import logging
import os
import resource
import warnings
from dataclasses import dataclass
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups
from torch.distributed import distributed_c10d
from torch.distributed.rendezvous import rendezvous

from configs.errors import RanksNotMet, UserError
from parallel.agreement import agree_on
from parallel.topology import Topology


def start(
    rank: int,
    world_size: int,
    local_rank: int,
    address: str,
    port: int,
    timeout_s: float,
    settings: dict[str, object] | None = None,
    fault: UserError | None = None,
) -> torch.device:
    """Join the default process group (NCCL where there is a GPU for this rank, else gloo); returns this rank's device.

    Args:
        timeout_s: after which any collective of any group made from now on gives up.
        settings: what every rank must have been started with; compared before any group is made.
        fault: what this rank has met already; if any rank has one, all raise it instead of making groups.

    Raises:
        UserError: the meeting port is taken, the other ranks never came, or they bring other settings or a fault.
    """
    keep_out_of_shared_memory()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # deepspeed 0.19.8 calls a collective that torch 2.13 renames; nothing a user could do about it.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*reduce_scatter_tensor.* is deprecated", category=FutureWarning)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_RANK=str(local_rank),
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    timeout = timedelta(seconds=timeout_s)
    time_out_every_group(timeout)
    if rank == 0:  # every rank holds three connections to the store here; 1,024 open files are the usual limit
        resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    backend = "nccl" if on_gpu else "gloo"
    try:
        store = next(rendezvous("env://", rank, world_size, timeout=timeout))[0]
        agree_on(settings or {}, fault, store, rank, world_size)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        # Finds the group made and only wraps it.
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout)
    except (dist.DistNetworkError, dist.DistStoreError, RuntimeError) as error:
        if told := _why_not_met(error, rank, world_size, f"{address}:{port}", timeout_s):
            raise told from None
        raise
    return device


def _why_not_met(error: RuntimeError, rank: int, world_size: int, place: str, timeout_s: float) -> UserError | None:
    """A UserError if the ranks could not meet; None for any other failure."""
    if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
        address, _, port = place.rpartition(":")
        return RanksNotMet(
            f"port {port} on {address} is in use",
            "a free port for the ranks to meet on",
            "set MASTER_PORT (deepspeed: --master_port, torchrun: --master-port) to another, or end its owner",
        )
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return RanksNotMet(
            f"rank {rank} could not meet the others on {place}: {str(error).splitlines()[0]}",
            f"{world_size} ranks there within {timeout_s:.0f} s",
            "see whether every rank was started, and whether the machines reach each other",
        )
    return None


def keep_out_of_shared_memory() -> None:
    """Keep DeepSpeed from building and mapping its shared-memory all-reduce on CPU.

    Upstream (deepspeed 0.19.8, comm/torch.py `build_shm_op`, csrc/cpu/comm/shm_interface.cpp): init_distributed
    compiles `deepspeed_shm_comm` (a killed build leaves a lock that every later start waits on for ever) and, where
    LOCAL_SIZE equals the world size, each rank leaves 66 MiB in /dev/shm that nobody unlinks. Only inference uses it.
    """
    os.environ.pop("LOCAL_SIZE", None)
    compatible = getattr(deepspeed.ops, "__compatible_ops__", None)
    if isinstance(compatible, dict):
        compatible["deepspeed_shm_comm"] = False


def time_out_every_group(timeout: timedelta) -> None:
    """Make `timeout` the default of every group that is made from now on, DeepSpeed's own included.

    Upstream (torch 2.13, distributed_c10d.py `_get_default_timeout`; deepspeed 0.19.8, runtime/pipe/topology.py): a
    time-out given to `init_process_group` is the default group's alone. `new_group` without one takes a constant of 10
    (NCCL) or 30 minutes, and DeepSpeed never gives one for its data, tensor and pipeline groups.
    """
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Groups:
    """This rank's groups; None where it needs none."""

    tensor: dist.ProcessGroup | None = None  # parts of the same layers
    ends: dist.ProcessGroup | None = None  # first and last stage, on ranks of those, where an embedding ties them
    expert: dist.ProcessGroup | None = None  # the other experts of this stage (a group of one where all are here)
    context: dist.ProcessGroup | None = None  # the other parts of the same sequences


def create(topology: Topology, tied_ends: bool) -> Groups:
    """Make the groups of a topology; all ranks call it together. Expert groups are handed to DeepSpeed, which would
    otherwise make its own.

    Args:
        tied_ends: the embedding of the first stage is the output weight of the last.
    """
    tensor = _mine(topology.tensor_groups(), topology.rank) if topology.tensor > 1 else None
    context = _mine(topology.context_groups(), topology.rank) if topology.context > 1 else None
    ends = _mine(topology.end_groups(), topology.rank) if tied_ends else None
    if not topology.experts_have_groups:
        return Groups(tensor, ends, context=context)
    name = expert_group_name(topology)
    experts, replicas = topology.expert_groups(), topology.expert_data_groups()
    for ranks, group_table, rank_table in (
        (experts, deepspeed_groups._EXPERT_PARALLEL_GROUP, deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS),
        (replicas, deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP, deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS),
    ):
        group_table[name] = _mine(ranks, topology.rank)
        rank_table[name] = next(listed for listed in ranks if topology.rank in listed)
    return Groups(tensor, ends, deepspeed_groups._EXPERT_PARALLEL_GROUP[name], context)


def _mine(rank_lists: list[list[int]], rank: int) -> dist.ProcessGroup | None:
    """Make a group of each list, in the same order on every rank; returns the one this rank is in."""
    made = [(ranks, dist.new_group(ranks)) for ranks in rank_lists]
    return next((group for ranks, group in made if rank in ranks), None)


def expert_group_name(topology: Topology) -> str:
    """DeepSpeed's key for the groups of this expert-parallel degree."""
    return f"ep_size_{topology.expert}"


def stop() -> None:
    """Leave all groups, after everyone has arrived: a rank that leaves early makes the others abort."""
    wait_for_all()
    leave()


def wait_for_all() -> None:
    if dist.is_initialized():
        dist.barrier()


def leave() -> None:
    """Leave all groups at once."""
    forget_expert_groups()
    if dist.is_initialized():
        dist.destroy_process_group()


def forget_expert_groups() -> None:
    """Take back what was handed to DeepSpeed, whose tables outlive an engine."""
    for table in (
        deepspeed_groups._EXPERT_PARALLEL_GROUP,
        deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS,
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP,
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
    ):
        table.clear()
