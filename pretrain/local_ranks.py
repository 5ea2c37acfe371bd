"""Runs a function on N real ranks on this machine (gloo) and hands back what each returned.

Torch and deepspeed are imported once, in a fork server that has used one thread only; each rank is a fork of it, so
eight ranks cost their work and not eight imports.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from configs.errors import UserError
from slurm.environ import LaunchEnv, free_port

TIMEOUT_S = 120.0


class LocalRanksFailed(RuntimeError):
    """A rank raised, died or did not finish; carries its own words."""


def run_ranks(num_ranks: int, function: Callable[..., Any], *args: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """Call `function(rank_env, *args)` on every rank; returns the results in order of rank.

    Raises:
        UserError: a rank raised it.
        LocalRanksFailed: with the traceback of the first rank that failed; the others are ended then, not waited for.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["pretrain.rank_imports"])
    port = free_port()
    pipes, processes = [], []
    for rank in range(num_ranks):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank_main, args=(theirs, rank, num_ranks, port, function, args), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return _collect(pipes, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            process.join(timeout=0 if process.exitcode is None else None)
            if process.is_alive():
                process.kill()
                process.join()


def _collect(pipes: list[Connection], deadline: float) -> list[Any]:
    results: dict[int, Any] = {}
    while len(results) < len(pipes):
        waiting = [pipe for rank, pipe in enumerate(pipes) if rank not in results]
        ready = wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            missing = [rank for rank in range(len(pipes)) if rank not in results]
            raise LocalRanksFailed(f"ranks {missing} did not finish in time")
        for pipe in ready:
            rank = pipes.index(pipe)  # type: ignore[arg-type]
            try:
                ok, value = pickle.loads(pipe.recv_bytes())  # type: ignore[union-attr]  # noqa: S301 (our own rank's)
            except EOFError:
                ok, value = False, "ended without a word"
            if not ok and isinstance(value, tuple):
                raise UserError(*value)
            if not ok:
                raise LocalRanksFailed(f"rank {rank} of {len(pipes)}: {value}")
            results[rank] = value
    return [results[rank] for rank in range(len(pipes))]


def _rank_main(pipe: Connection, rank: int, world: int, port: int, function: Any, args: Any) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    try:
        # Plain pickle: multiprocessing's own would pass tensors as files of a process that is about to end.
        answer = pickle.dumps((True, function(LaunchEnv.read(), *args)))
    except UserError as error:
        answer = pickle.dumps((False, (error.found, error.expected, error.remedy)))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(answer)
    pipe.close()
