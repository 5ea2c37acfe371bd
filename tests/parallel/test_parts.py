"""Topology, boxes, dispatcher, agreements between ranks."""

from __future__ import annotations

import math

import deepspeed
import pytest
import torch
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from hypothesis import given
from hypothesis import strategies as st

from parallel import groups
from parallel.fragments import flat_range_boxes
from parallel.sharding import cut
from parallel.topology import Topology
from pretrain.local_ranks import run_ranks
from tests.parallel.jobs import dispatch_job, error_job, layer_input
from tests.tiny import make_model, tiny_config

DEGREES = st.sampled_from([1, 2, 4])


@given(DEGREES, DEGREES, DEGREES, DEGREES)
def test_expert_groups_partition_each_stage(data: int, tensor: int, pipeline: int, expert: int) -> None:
    if (data * tensor) % expert:
        return
    layout = Topology(0, data, tensor, pipeline, expert)
    for listed in (layout.expert_groups(), layout.expert_data_groups()):
        assert sorted(rank for ranks in listed for rank in ranks) == list(range(layout.world_size))
        for ranks in listed:
            assert len({Topology(r, data, tensor, pipeline, expert).stage for r in ranks}) == 1
    for ranks in layout.expert_groups():
        assert [Topology(r, data, tensor, pipeline, expert).expert_rank for r in ranks] == list(range(expert))
    for ranks in layout.expert_data_groups():
        assert len({Topology(r, data, tensor, pipeline, expert).expert_rank for r in ranks}) == 1


@given(DEGREES, DEGREES, DEGREES)
def test_ranks_stand_where_deepspeed_puts_them(data: int, tensor: int, pipeline: int) -> None:
    grid = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=data)
    for rank in range(data * tensor * pipeline):
        ours, theirs = Topology(rank, data, tensor, pipeline), grid.get_coord(rank)
        assert (ours.stage, ours.data_rank, ours.tensor_rank) == (theirs.pipe, theirs.data, theirs.model)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_boxes_of_a_flat_range(shape: list[int], data: st.DataObject) -> None:
    total = math.prod(shape)
    start = data.draw(st.integers(0, total))
    count = data.draw(st.integers(0, total - start))
    whole, found = torch.arange(total).view(shape), []
    boxes = list(flat_range_boxes(start, count, tuple(shape)))
    for position, offset, size in boxes:
        values = whole[tuple(slice(o, o + n) for o, n in zip(offset, size))].flatten()
        assert values[0] == position
        found += values.tolist()
    assert found == list(range(start, start + count))
    assert len(boxes) <= 2 * len(shape) - 1


def test_cut_leaves_each_rank_its_experts_only() -> None:
    config = tiny_config().model
    whole = make_model(config)
    with torch.device("meta"):
        from model.glam import GLaM

        part = GLaM(config)
    placements = cut(part, Topology(3, data=4, expert=4))
    for name, parameter in part.named_parameters():
        shape = tuple(dict(whole.named_parameters())[name].shape)
        assert placements[name].global_shape == shape
        if ".experts." in name:
            assert tuple(parameter.shape) == (1, *shape[1:]) and placements[name].offset[0] == 3
        else:
            assert tuple(parameter.shape) == shape


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("capacity", ["null", "{factor: 0.7}"])
def test_all_to_all_equals_local_dispatch(ranks: int, capacity: str) -> None:
    """The same layer with all experts at home, on each rank's input: outputs and input gradients to the bit."""
    config = tiny_config(f"parallel.expert={ranks}", f"model.moe.router.capacity={capacity}")
    spread = run_ranks(ranks, dispatch_job, config)
    model = make_model(config.model, config.train.seed)
    moe = model.moe_blocks()[0].moe
    assert moe is not None
    summed = {name: torch.zeros_like(p) for name, p in moe.experts.named_parameters()}
    for rank, found in enumerate(spread):
        moe.zero_grad()
        x = layer_input(config, rank).requires_grad_()
        y, _, _ = moe(x)
        y.square().sum().backward()
        # Grouped products of other row counts may take another kernel: equal to rounding, not always to the bit.
        torch.testing.assert_close(found["y"], y.detach(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["x"], x.grad, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(found["router"], moe.router.weight.grad, rtol=1e-4, atol=1e-6)
        for name, parameter in moe.experts.named_parameters():
            assert parameter.grad is not None
            summed[name] += parameter.grad
    for name, gradient in summed.items():
        together = torch.cat([found["experts"][name] for found in spread])
        torch.testing.assert_close(together, gradient, rtol=1e-5, atol=1e-5)


def test_one_ranks_error_reaches_all() -> None:
    assert run_ranks(3, error_job, 1) == ["rank 1"] * 3


def test_upstream_still_needs_to_be_kept_out_of_shared_memory() -> None:
    """Red when deepspeed drops the operator or moves the table: then `keep_out_of_shared_memory` goes or moves."""
    groups.keep_out_of_shared_memory()
    assert "deepspeed_shm_comm" in deepspeed.ops.__compatible_ops__
