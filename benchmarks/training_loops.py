"""The two loops that `training_step` compares: our trainer, and what one would write without one.

B batch, S sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from configs.run import RunConfig
from parallel.engine import Engine, MicroBatch
from parallel.groups import Groups
from parallel.topology import Topology
from pretrain.build import materialise
from pretrain.health import fit_to_apply

LR = 1e-4


class Trainer:
    """What `pretrain.loop` does in a step, less the log."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        topology = Topology(rank=0, data=1, tensor=1, pipeline=1, expert=1)
        self._engine = Engine(materialise(config, topology, Groups(), device), config, device)
        self._batches = _batches(config)
        self.losses: list[float] = []

    def step(self) -> None:
        self.losses.append(self._engine.train_step(next(self._batches), LR, fit_to_apply).cross_entropy)


@dataclass
class _Masters:
    """Float32 copies of bf16 weights, for the optimizer to move."""

    weights: list[nn.Parameter]
    float32: list[nn.Parameter] = field(init=False)

    def __post_init__(self) -> None:
        self.float32 = [nn.Parameter(weight.detach().float()) for weight in self.weights]

    def take_gradients(self) -> None:
        for master, weight in zip(self.float32, self.weights):
            master.grad = weight.grad.float() if weight.grad is not None else None
            weight.grad = None

    def hand_back(self) -> None:
        with torch.no_grad():
            for weight, master in zip(self.weights, self.float32):
                weight.copy_(master)


class BareLoop:
    """What one would write without a trainer."""

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        topology = Topology(rank=0, data=1, tensor=1, pipeline=1, expert=1)
        self._model = materialise(config, topology, Groups(), device).model
        weights = list(self._model.parameters())
        self._masters: _Masters | None = None
        if config.train.precision == "bf16":
            self._model.to(torch.bfloat16)
            self._masters = _Masters(weights)
        self._moved = self._masters.float32 if self._masters else weights
        spec = config.train.optimizer
        decayed = [m for m, (name, p) in zip(self._moved, self._model.named_parameters()) if _is_decayed(name, p)]
        chosen = {id(p) for p in decayed}
        listed: list[dict[str, Any]] = [
            {"params": decayed},
            {"params": [p for p in self._moved if id(p) not in chosen], "weight_decay": 0.0},
        ]
        self._optimizer = torch.optim.AdamW(
            listed, lr=LR, betas=(spec.beta1, spec.beta2), eps=spec.epsilon, weight_decay=spec.weight_decay, fused=True
        )
        self._clip_norm, self._device = config.train.clip_norm, device
        self._num_micro_batches = config.train.num_micro_batches(1)
        for block in self._model.blocks:
            block.aux_scale = 1 / self._num_micro_batches  # type: ignore[assignment]
        self._batches = _batches(config)
        self.losses: list[float] = []

    def step(self) -> None:
        self._model.cross_entropies.clear()
        for block in self._model.moe_blocks().values():
            block.totals.take()
        for token_BS, label_BS in next(self._batches):
            hidden_BSD = self._model.hidden(token_BS.to(self._device))
            loss = self._model.loss(hidden_BSD, label_BS.to(self._device))
            (loss / self._num_micro_batches).backward()
        if self._masters:
            self._masters.take_gradients()
        if self._clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self._moved, self._clip_norm, foreach=True)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._masters:
            self._masters.hand_back()
        self.losses.append(float(torch.stack(self._model.cross_entropies).mean()))


def _batches(config: RunConfig) -> Iterator[list[MicroBatch]]:
    """The same endless batches for every loop: random tokens, common ones more often."""
    generator = torch.Generator().manual_seed(1)
    shape = (config.train.batch_sequences, config.train.sequence_length + 1)
    while True:
        drawn = torch.rand(shape, generator=generator).pow(3) * config.model.vocab_size
        parts = drawn.long().clamp_(max=config.model.vocab_size - 1).split(config.train.micro_batch_sequences)
        yield [(part[:, :-1], part[:, 1:]) for part in parts]


def _is_decayed(name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim >= 2 and not name.endswith("bias.table")
