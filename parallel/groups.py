"""Process groups: start, the groups of experts, the end."""

from __future__ import annotations

import logging
import os
import warnings
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.utils import groups as deepspeed_groups

from configs.errors import UserError
from parallel.topology import Topology


def start(rank: int, world_size: int, local_rank: int, address: str, port: int, timeout_s: float) -> torch.device:
    """Join the default process group (NCCL where there is a GPU for this rank, else gloo); returns this rank's device.

    Raises:
        UserError: the meeting port is taken, or the other ranks never came.
    """
    keep_out_of_shared_memory()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # deepspeed 0.19.8 calls a collective that torch 2.13 renames; nothing a user could do about it.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.* is deprecated", category=FutureWarning)
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
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if on_gpu else "gloo",
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=timeout_s),
            rank=rank,
            world_size=world_size,
        )
    except (dist.DistNetworkError, dist.DistStoreError, RuntimeError) as error:
        if "EADDRINUSE" in str(error) or "address already in use" in str(error).lower():
            raise UserError(
                f"port {port} on {address} is in use",
                "a free port for the ranks to meet on",
                "set MASTER_PORT (deepspeed: --master_port, torchrun: --master-port) to another, or end its owner",
            ) from None
        if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
            raise UserError(
                f"rank {rank} could not meet the others on {address}:{port}: {str(error).splitlines()[0]}",
                f"{world_size} ranks there within {timeout_s:.0f} s",
                "see whether every rank was started, and whether the machines reach each other",
            ) from None
        raise
    return device


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


def expert_group_name(topology: Topology) -> str:
    """DeepSpeed's key for the groups of this expert-parallel degree."""
    return f"ep_size_{topology.expert}"


def create_expert_groups(topology: Topology) -> None:
    """Make the expert groups from the topology and hand them to DeepSpeed, which would otherwise make its own."""
    name = expert_group_name(topology)
    tables = (
        (
            topology.expert_groups(),
            deepspeed_groups._EXPERT_PARALLEL_GROUP,
            deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS,
        ),
        (
            topology.expert_data_groups(),
            deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP,
            deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
        ),
    )
    for rank_lists, group_table, rank_table in tables:
        for ranks in rank_lists:
            group = dist.new_group(ranks)
            if topology.rank in ranks:
                group_table[name], rank_table[name] = group, ranks


def expert_group(topology: Topology) -> dist.ProcessGroup:
    """The ranks that hold the other experts of this stage."""
    return deepspeed_groups._EXPERT_PARALLEL_GROUP[expert_group_name(topology)]  # type: ignore[no-any-return]


def stop() -> None:
    """Leave all groups, after everyone has arrived: a rank that leaves early makes the others abort."""
    if dist.is_initialized():
        dist.barrier()
        abandon()


def abandon() -> None:
    """Leave all groups at once, for a rank that fails."""
    for table in (
        deepspeed_groups._EXPERT_PARALLEL_GROUP,
        deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS,
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP,
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
    ):
        table.clear()
    if dist.is_initialized():
        dist.destroy_process_group()
