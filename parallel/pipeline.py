"""The model as DeepSpeed's PipelineModule: a chain of one tensor in, one tensor out, ended by the loss."""

from __future__ import annotations

import contextlib
import io

from deepspeed.pipe import PipelineModule
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

from model.glam import GLaM
from parallel.expert import ExpertMarker
from parallel.topology import Topology


def pipeline_module(model: GLaM, topology: Topology) -> PipelineModule:
    """Wrap a materialised model. The model keeps its parameters and their names; the wrapper only calls it."""
    grid = PipeModelDataParallelTopology(num_pp=topology.pipeline, num_mp=topology.tensor, num_dp=topology.data)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its seeds
        # Recomputation is the block's own (it must keep its routing), so DeepSpeed's is off.
        module = PipelineModule(
            model.layers(),
            topology=grid,
            loss_fn=model.loss,
            partition_method="uniform",
            activation_checkpoint_interval=0,
        )
    if model.head is not None:
        # Untied output weights are used by the loss, not by a layer of the chain, yet are to be trained all the same.
        module.add_module("head", model.head)
    if topology.expert > 1 and model.config.moe is not None:
        # On every stage, also one without experts: stages that differ here reduce differently, and hang.
        module.add_module("expert_marker", ExpertMarker(model.config.moe.num_experts))
    return module
