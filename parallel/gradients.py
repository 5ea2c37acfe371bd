"""Gradients on their way to the optimizer: what DeepSpeed leaves to sum, their global norm, and clipping by it.

Three optimizers: DeepSpeed's ZeRO-1 in float32 and in bf16, and torch's own (ZeRO-0).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

from parallel.sharding import Placement
from parallel.topology import Topology


def is_sharded(optimizer: Any) -> bool:
    """Whether each data-parallel rank holds a part of the state only (ZeRO-1)."""
    return not isinstance(optimizer, torch.optim.Optimizer)


def accumulated(parameter: Any, optimizer: Any) -> Tensor | None:
    """A parameter's gradient over all micro-batches, before data-parallel ranks reduce it: float32."""
    found: Tensor | None = getattr(parameter, "_hp_grad" if isinstance(optimizer, BF16_Optimizer) else "grad", None)
    return found


def sum_over_tensor_ranks(parameters: Iterable[Any], optimizer: Any, group: dist.ProcessGroup) -> None:
    """Complete the gradients of replicated parameters of which each tensor rank saw its own tokens or heads.

    Upstream (deepspeed 0.19.8, runtime/pipe/engine.py `_exec_reduce_grads`) reduces over data-parallel ranks only, and
    leaves these to the model; Megatron-LM does it in `finalize_model_grads`.
    """
    found = [accumulated(parameter, optimizer) for parameter in parameters]
    gradients = [gradient for gradient in found if gradient is not None]
    # A list shorter than that of another tensor rank would hang; every one of these takes part in every pass.
    assert len(gradients) == len(found)
    together = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(together, group=group)
    for gradient, summed in zip(gradients, together.split([g.numel() for g in gradients])):
        gradient.copy_(summed.view_as(gradient))


def reduced(optimizer: Any) -> Iterable[tuple[Any, int, Tensor]]:
    """(parameter, start, flat gradient): the part [start, start + len) of each flattened parameter whose mean gradient
    over data-parallel ranks this rank's optimizer holds."""
    if not is_sharded(optimizer):
        for group in optimizer.param_groups:
            yield from ((p, 0, p.grad.flatten()) for p in group["params"])
    elif isinstance(optimizer, BF16_Optimizer):
        for number, parameters in enumerate(optimizer.bf16_groups):
            flat = optimizer.fp32_groups_gradient_flat_partition[number]
            for parameter in parameters:
                if (mapping := parameter._hp_mapping) is not None:
                    address = mapping.get_hp_fragment_address()
                    yield parameter, mapping.lp_fragment_address.start, flat.narrow(0, address.start, address.numel)
    else:
        for number in range(len(optimizer.bit16_groups)):
            gradients = [g for g in optimizer.averaged_gradients[number] if not getattr(g, "_zero_padding", False)]
            for parameter, gradient in zip(optimizer.params_in_partition[number], gradients):
                yield parameter, parameter._hp_mapping.lp_fragment_address.start, gradient.flatten()


def local_squared_norm(optimizer: Any, placed: dict[int, Placement], topology: Topology) -> Tensor:
    """Sum of squares, float64, of the reduced gradients on this rank, each element of the model counted on one rank
    only. Summed over all ranks it is the squared global norm.

    Args:
        placed: id of each parameter -> its placement.
    """
    sharded = is_sharded(optimizer)
    parts = [g for parameter, _, g in reduced(optimizer) if counted_here(placed[id(parameter)], topology, sharded)]
    # vector_norm converts on the fly; .double() would hold twice the gradients.
    norms = [torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]
    return torch.stack(norms).square().sum() if norms else torch.zeros((), dtype=torch.float64)


def counted_here(placed: Placement, topology: Topology, sharded: bool) -> bool:
    """Whether, of the ranks that hold the same gradient, this is the one to count it."""
    if placed.is_expert and topology.experts_have_groups:
        # Spread over tensor ranks too; ZeRO-1 shares the state of replicas among those, so each element is held once.
        return sharded or topology.expert_replica == 0
    first_of_tensor = topology.tensor_rank == 0 or bool({"tensor", "expert_width"} & set(placed.axes))
    return first_of_tensor and (sharded or topology.lane == 0)


def hand_over_norm(optimizer: Any, norm: Tensor) -> None:
    """Make DeepSpeed's ZeRO-1 clip by our norm instead of computing its own.

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


def clip_unsharded(optimizer: torch.optim.Optimizer, norm: float, clip_norm: float | None) -> None:
    """Clip the gradients of ZeRO-0 by the global norm.

    Upstream (deepspeed 0.19.8, runtime/utils.py `clip_grad_norm_`): under a pipeline the norm misses what is replicated
    on every stage but the first, and under expert parallelism it averages over ranks instead of summing.
    """
    if clip_norm is not None and norm > clip_norm:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        torch._foreach_mul_(gradients, clip_norm / (norm + 1e-6))


def discard(optimizer: Any) -> None:
    """Forget this step's gradients, as DeepSpeed does on an overflow, without touching anything else.

    A step judged unfit never reaches the optimizer: what each does with a norm that is no number differs (ZeRO-0 has
    no check at all), and a finite spike none would refuse.
    """
    optimizer.zero_grad(set_to_none=True)
    if is_sharded(optimizer) and not isinstance(optimizer, BF16_Optimizer):
        for table in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            for key in table:
                table[key] = None
