"""The global gradient norm, right under every layout, and its hand-over to DeepSpeed's clipping."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

from parallel.topology import Topology


def local_squared_norm(optimizer: Any, topology: Topology) -> Tensor:
    """Sum of squares, float64, of the reduced gradients this rank's optimizer partition owns, each element of the
    model counted on one rank only. Summed over all ranks it is the squared global norm."""
    parts = [gradient for parameter, gradient in _owned(optimizer) if _counted_here(parameter, topology)]
    # vector_norm converts on the fly; .double() would hold twice the gradients.
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)


def _owned(optimizer: Any) -> Iterable[tuple[Any, Tensor]]:
    """(parameter, the part of its reduced gradient in this rank's partition)."""
    if isinstance(optimizer, BF16_Optimizer):
        for group, parameters in enumerate(optimizer.bf16_groups):
            flat = optimizer.fp32_groups_gradient_flat_partition[group]
            for parameter in parameters:
                if parameter._hp_mapping is not None:
                    address = parameter._hp_mapping.get_hp_fragment_address()
                    yield parameter, flat.narrow(0, address.start, address.numel)
        return
    for group in range(len(optimizer.bit16_groups)):
        gradients = [g for g in optimizer.averaged_gradients[group] if not getattr(g, "_zero_padding", False)]
        yield from zip(optimizer.params_in_partition[group], gradients)


def _counted_here(parameter: Any, topology: Topology) -> bool:
    if getattr(parameter, "ds_pipe_replicated", False):
        return False  # the copy of a tied weight on a later stage
    # Experts are spread over tensor ranks too; anything else whole on each tensor rank counts once.
    return is_moe_param(parameter) or getattr(parameter, "tensor_model_parallel", False) or topology.tensor_rank == 0


def hand_over_norm(optimizer: Any, norm: Tensor) -> None:
    """Make DeepSpeed clip by our norm instead of computing its own.

    Upstream (deepspeed 0.19.8): `stage_1_and_2.get_grad_norm_direct` counts experts on tensor rank 0 only (wrong under
    TP), and both optimizers reduce the norm group by group, which deadlocks when a pipeline stage holds no experts.
    """
    if isinstance(optimizer, BF16_Optimizer):
        if not hasattr(optimizer, "_all_gradients"):
            optimizer._all_gradients = optimizer.get_grads_for_norm
        optimizer.mpu = None  # or the norm below would be summed over model-parallel ranks
        optimizer.get_grads_for_norm = lambda for_clipping=False: (
            optimizer._all_gradients(for_clipping=True) if for_clipping else ([norm.float()], {})
        )
    else:
        optimizer.scaled_global_norm = lambda norm_type=2: norm.float()
