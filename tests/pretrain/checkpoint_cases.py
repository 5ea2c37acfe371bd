"""Real checkpoints of a tiny model, as one process and as several ranks write them."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.run import RunConfig
from parallel import checkpoint_store as store
from parallel import groups
from parallel.checkpoint_plan import Tensors
from parallel.checkpoint_serial import WholeReader
from parallel.fragments import fragment_boxes
from parallel.sharding import Placement
from parallel.topology import Topology
from pretrain.data import Cursor
from pretrain.state import TrainState
from slurm.environ import LaunchEnv
from tests.tiny import make_model


def whole_tensors(config: RunConfig, seed: int) -> dict[str, Tensor]:
    """Masters, both moments and a generator's state; norms and tables are random too."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, parameter in make_model(config.model, seed).named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.1
        tensors[f"{name}/weight"] = parameter.detach() + noise
        tensors[f"{name}/exp_avg"] = noise
        tensors[f"{name}/exp_avg_sq"] = noise.square()
    tensors["random_state/rank-00000"] = generator.get_state()
    return tensors


def document(config: RunConfig, step: int, **degrees: int) -> dict[str, Any]:
    """As `pretrain/checkpoint.py` writes it."""
    state = TrainState(step, step, step * config.train.batch_tokens, cursor=Cursor({"a": step * 8}))
    return {
        "config": config.model_dump(mode="json"),
        "state": state.to_json(),
        "layout": Topology(0, **{"data": 1, **degrees}).degrees(),
        "tokenizers": {"a": "5e" * 32},
        "saved": {"time": time.time(), "start": 1, "torch": torch.__version__},
    }


def write(folder: Path, config: RunConfig, seed: int = 0, step: int = 1, **changes: Tensor) -> dict[str, Tensor]:
    """A checkpoint by one process; returns what it holds. `changes` replace tensors."""
    tensors = {**whole_tensors(config, seed), **changes}
    store.save(folder, tensors, document(config, step))
    return tensors


def write_run(run: Path, config: RunConfig, seeds: list[int]) -> list[dict[str, Tensor]]:
    """A run with checkpoints of steps 1, 2, ..., each of other values."""
    return [
        write(run / "checkpoints" / f"step-{step:08d}", config, seed, step) for step, seed in enumerate(seeds, start=1)
    ]


def read(folder: Path, suffix: str = "") -> dict[str, Tensor]:
    """Every tensor of a checkpoint whose name has the ending, whole."""
    with WholeReader(folder) as reader:
        found = {name: stored for name, stored in reader.manifest.tensors.items() if name.endswith(suffix)}
        return {name: reader.rows(name, 0, stored.shape[0] if stored.shape else 1) for name, stored in found.items()}


def ranks_job(env: LaunchEnv, folder: str, config: RunConfig, seed: int, step: int) -> None:
    """The tensors of `whole_tensors`, each cut over the ranks anywhere in its flat order, as ZeRO does."""
    groups.start(env.rank, env.world_size, env.local_rank, env.master_addr, env.master_port, 60)
    tensors: Tensors = {
        name: _mine(value, env) if value.dtype == torch.float32 else value
        for name, value in whole_tensors(config, seed).items()
    }
    store.save(Path(folder), tensors, document(config, step, data=env.world_size))
    groups.stop()


def _mine(value: Tensor, env: LaunchEnv) -> Any:
    shape, size = tuple(value.shape), math.prod(value.shape)
    ends = [size * n // env.world_size + (n == 1) for n in range(env.world_size)] + [size]
    start, end = ends[env.rank], ends[env.rank + 1]
    return fragment_boxes(value.flatten()[start:end], start, shape, Placement(shape, (0,) * len(shape)))


def planted(value: Tensor, index: int, new: float) -> Tensor:
    """A copy with one element replaced, counted in flat order."""
    copy = value.clone()
    copy.view(-1)[index] = new
    return copy
