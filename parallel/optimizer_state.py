"""The optimizer's state as flat pieces of parameters, whichever of three optimizers holds it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

from parallel.gradients import is_sharded

MOMENTS = ("exp_avg", "exp_avg_sq")


def state_fragments(optimizer: Any) -> Iterator[tuple[Any, int, dict[str, Tensor]]]:
    """(parameter, start, {"weight", "exp_avg", "exp_avg_sq"}): flat float32 views of the elements from `start` on of
    each flattened parameter that this rank's optimizer keeps."""
    if not is_sharded(optimizer):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                state = _ready(optimizer, parameter)
                pieces = {"weight": parameter.detach(), **{key: state[key] for key in MOMENTS}}
                yield parameter, 0, {key: tensor.view(-1) for key, tensor in pieces.items()}
        return
    for parameters, flat, state in _partitions(optimizer):
        pieces = {"weight": flat.detach(), **{key: state[key] for key in MOMENTS}}
        for parameter in parameters:
            if (mapping := parameter._hp_mapping) is not None:
                here, whole = mapping.lp_fragment_address, mapping.hp_fragment_address
                yield parameter, here.start, {k: t.narrow(0, whole.start, whole.numel) for k, t in pieces.items()}


def take_over(optimizer: Any, updates: int) -> None:
    """After the fragments were written: set the number of updates, and refresh the working weights from the masters."""
    if not is_sharded(optimizer):
        for state in optimizer.state.values():
            state["step"].fill_(float(updates))
        return
    for _, _, state in _partitions(optimizer):
        state["step"].fill_(float(updates))
    optimizer.update_lp_params()


def _partitions(wrapper: Any) -> Iterator[tuple[list[Any], Tensor, dict[str, Tensor]]]:
    """(parameters, this rank's flat float32 partition, its AdamW state) of each parameter group.

    Upstream (deepspeed 0.19.8, stage_1_and_2.py `_lazy_init_hp_params_optimizer_state`): state is linked to
    parameters after the first group's step only, so experts' moments are not found through DeepSpeed's own
    getters. The flat partitions know them.
    """
    lists = wrapper.bf16_groups if isinstance(wrapper, BF16_Optimizer) else wrapper.bit16_groups
    for parameters, group in zip(lists, wrapper.optimizer.param_groups):
        flat = group["params"][0]
        yield parameters, flat, _ready(wrapper.optimizer, flat)


def _ready(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """A parameter's AdamW state, made if no step has made it yet."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if "exp_avg" not in state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
    return state
