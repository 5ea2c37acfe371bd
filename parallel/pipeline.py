"""The model as DeepSpeed's PipelineModule: a chain of one tensor in, one tensor out, ended by the loss."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.pipe import DualPipeVModule, PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import Tensor, nn

from parallel.expert import ExpertMarker
from parallel.part import Part


class _CutWhereTold(PipelineModule):
    """Takes its cuts as numbers: DeepSpeed's own ways of cutting count layers or parameters, not time."""

    def _partition_layers(self, method: str = "") -> None:
        self.parts = [int(number) for number in method.split(",")]
        self._set_bounds(self.parts[self.stage_id], self.parts[self.stage_id + 1])


class _VCutWhereTold(DualPipeVModule, _CutWhereTold):
    """The same with two pieces a rank; DualPipeVModule finds its second piece from the cuts."""


def pipeline_module(part: Part) -> PipelineModule:
    """Wrap this rank's part. The model keeps its parameters and their names; the wrapper only calls it."""
    topology, model = part.topology, part.model
    grid = PipeModelDataParallelTopology(num_pp=topology.pipeline, num_mp=topology.tensor, num_dp=topology.lanes)
    kind = _VCutWhereTold if part.stages.v_shaped else _CutWhereTold
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its seeds
        # Recomputation is the block's own (it must keep its routing), so DeepSpeed's is off.
        module = kind(
            model.layers(),
            topology=grid,
            loss_fn=model.loss,
            partition_method=",".join(str(bound) for bound in part.stages.bounds),
            activation_checkpoint_interval=0,
        )
    if model.head is not None and part.stages.ends(topology.stage):
        # Untied output weights are used by the loss, not by a layer of the chain, yet are to be trained all the same.
        module.add_module("head", model.head)
    has_experts = any(block.moe is not None for block in part.local_blocks().values())
    if topology.experts_have_groups and has_experts:
        assert model.config.moe is not None
        module.add_module("expert_marker", ExpertMarker(model.config.moe.num_experts))
    return module


@contextlib.contextmanager
def as_many_micro_batches(engine: Any, num_micro_batches: int) -> Iterator[None]:
    """Let DeepSpeed's pipeline run another number of micro-batches than a training step has.

    Upstream (deepspeed 0.19.8, runtime/pipe/dualpipev.py `_phase1_buffer`): DualPipeV keeps the second half of a
    micro-batch's way at its number plus the training step's count, so that more of them than that overwrite each other.
    """
    usual, engine.micro_batches = engine.micro_batches, num_micro_batches
    try:
        yield
    finally:
        engine.micro_batches = usual


class TiedEmbedding:
    """Keeps the copy of a tied embedding on the last stage one with the original on the first.

    The copy belongs to no optimizer: its gradient, summed in float32 over micro-batches, goes to the first stage each
    step, and the updated weights come back. Two copies trained side by side (DeepSpeed's TiedLayerSpec) cost their
    optimizer state twice, and drift apart by rounding wherever their gradients are summed in another order.
    """

    FIRST, LAST = 0, 1  # places in the group of the two ends

    def __init__(self, weight: nn.Parameter, group: dist.ProcessGroup) -> None:
        self.weight, self.group, self.is_copy = weight, group, group.rank() == self.LAST
        if self.is_copy:
            self.gradient = torch.zeros_like(weight, dtype=torch.float32)
            weight.register_post_accumulate_grad_hook(self._accumulate)

    def _accumulate(self, weight: Any) -> None:
        self.gradient.add_(weight.grad)
        weight.grad = None

    def hand_over_gradient(self, original: Tensor | None) -> None:
        """Add the copy's gradient to the original's. Both ends call it.

        Args:
            original: the float32 gradient on the first stage, changed in place; None on the last.
        """
        if self.is_copy:
            dist.broadcast(self.gradient, group=self.group, group_src=self.LAST)
            self.gradient.zero_()
        else:
            assert original is not None
            arrived = torch.empty_like(original, dtype=torch.float32)
            dist.broadcast(arrived, group=self.group, group_src=self.LAST)
            original.add_(arrived)

    def refresh(self) -> None:
        """Bring the original's weights to the copy. Both ends call it."""
        dist.broadcast(self.weight.data, group=self.group, group_src=self.FIRST)
