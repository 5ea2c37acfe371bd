"""Topology, boxes, dispatcher, agreements between ranks."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from hypothesis import given
from hypothesis import strategies as st

from model.glam import GLaM
from parallel.fragments import flat_range_boxes
from parallel.sharding import cut
from parallel.stages import cut_by_cost
from parallel.topology import Topology
from pretrain.local_ranks import run_ranks
from tests.parallel.jobs import dispatch_job, error_job, fault_job, imported_job, layer_input, settings_job
from tests.tiny import make_model, tiny_config

NORMS = ("attention_norm", "ffn_norm", "query_norm", "key_norm", "norm")
DEGREES = st.sampled_from([1, 2, 4])


@given(DEGREES, DEGREES, DEGREES, DEGREES, DEGREES, st.booleans())
def test_expert_groups_partition_each_stage(
    data: int, context: int, tensor: int, pipeline: int, expert: int, expert_tensor: bool
) -> None:
    if data * context * (1 if expert_tensor else tensor) % expert:
        return
    layout = Topology(0, data, tensor, pipeline, expert, expert_tensor, context=context)
    sharing = (layout.tensor_groups(), layout.context_groups(), layout.lane_groups())
    for listed in (layout.expert_groups(), layout.expert_data_groups(), *sharing):
        assert sorted(rank for ranks in listed for rank in ranks) == list(range(layout.world_size))
        for ranks in listed:
            assert len({layout.at(r).stage for r in ranks}) == 1
    for ranks in layout.expert_groups():
        assert [layout.at(r).expert_rank for r in ranks] == list(range(expert))
        # Cut experts: one group is at one tensor rank, so that its parts add up over the tensor group.
        assert len({layout.at(r).tensor_rank for r in ranks}) == 1 or not expert_tensor
    for ranks in layout.expert_data_groups():
        assert len({(layout.at(r).expert_rank, layout.at(r).expert_width_rank) for r in ranks}) == 1
        assert [layout.at(r).expert_replica for r in ranks] == list(range(len(ranks)))
    for ranks in layout.tensor_groups():
        assert ranks == list(range(ranks[0], ranks[0] + tensor))
    for ranks in layout.context_groups():
        assert [layout.at(r).context_rank for r in ranks] == list(range(context))
        assert len({(layout.at(r).data_rank, layout.at(r).tensor_rank) for r in ranks}) == 1
        # Who shares sequences are neighbours.
        assert len({r // (context * tensor) for r in ranks}) == 1
    for ranks in layout.lane_groups():
        assert [layout.at(r).lane for r in ranks] == list(range(data * context))


@given(DEGREES, DEGREES, DEGREES, DEGREES)
def test_ends_are_pairs_of_the_same_part(data: int, context: int, tensor: int, pipeline: int) -> None:
    layout = Topology(0, data, tensor, pipeline, context=context)
    pairs = layout.end_groups()
    assert len(pairs) == (data * context * tensor if pipeline > 1 else 0)
    for first, last in pairs:
        a, b = layout.at(first), layout.at(last)
        assert (a.stage, b.stage) == (0, pipeline - 1)
        assert (a.lane, a.tensor_rank) == (b.lane, b.tensor_rank)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=7), st.integers(0, 9), st.integers(1, 4), st.booleans())
def test_stages_are_the_cheapest_cuts(costs: list[int], end: int, ranks: int, v_shaped: bool) -> None:
    pieces = ranks * (2 if v_shaped and ranks > 1 else 1)
    if pieces > len(costs):
        return
    stages = cut_by_cost([float(cost) for cost in costs], float(end), ranks, v_shaped)
    together = [*costs[:-1], costs[-1] + end]

    def largest(cuts: tuple[int, ...]) -> int:
        edges = (0, *cuts, len(costs))
        return max(sum(together[a:b]) for a, b in itertools.pairwise(edges))

    least = min(largest(cuts) for cuts in itertools.combinations(range(1, len(costs)), pieces - 1))
    inner = tuple(bound - 1 for bound in stages.bounds[1:-1])
    assert len(stages.bounds) == pieces + 1 and largest(inner) == least
    held = [block for stage in range(ranks) for block in stages.blocks(stage)]
    assert sorted(held) == list(range(len(costs)))
    assert all(stages.blocks(stage) for stage in range(ranks))
    assert [stage for stage in range(ranks) if stages.ends(stage)] == [0 if v_shaped else ranks - 1]
    assert stages.ends_apart == (ranks > 1 and not v_shaped)


@given(DEGREES, DEGREES, DEGREES, DEGREES)
def test_ranks_stand_where_deepspeed_puts_them(data: int, context: int, tensor: int, pipeline: int) -> None:
    """Which knows lanes only: data and context ranks are the same to it."""
    grid = PipeModelDataParallelTopology(num_pp=pipeline, num_mp=tensor, num_dp=data * context)
    for rank in range(data * context * tensor * pipeline):
        ours, theirs = Topology(rank, data, tensor, pipeline, context=context), grid.get_coord(rank)
        assert (ours.stage, ours.lane, ours.tensor_rank) == (theirs.pipe, theirs.data, theirs.model)
        assert ours.lane == ours.data_rank * context + ours.context_rank


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


LAYOUTS = [
    Topology(0, data=4, expert=4),
    Topology(0, data=2, tensor=2, expert=2),
    Topology(0, data=2, tensor=2, expert=2, expert_tensor=True),
    Topology(0, data=1, tensor=2, expert=2, pipeline=2),
    Topology(0, data=1, context=2, tensor=2, expert=4),
    Topology(0, data=2, context=2, tensor=2, expert=2, expert_tensor=True),
]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_parts_of_all_ranks_cover_every_parameter_evenly(layout: Topology) -> None:
    """Each element lies on as many ranks of a stage as the table leaves replicas, whichever element it is."""
    config = tiny_config("model.tied_embedding=false", "model.moe.expert.gated=true").model
    held: dict[str, torch.Tensor] = {}
    for rank in range(layout.ranks_per_stage):
        with torch.device("meta"):
            part = GLaM(config)
        placements = cut(part, layout.at(rank))
        for name, parameter in part.named_parameters():
            placed = placements[name]
            count = held.setdefault(name, torch.zeros(placed.global_shape))
            count[tuple(slice(o, o + n) for o, n in zip(placed.offset, parameter.shape))] += 1
    for name, count in held.items():
        assert count.min() == count.max(), name
        tensor_cut = (
            layout.tensor if name.split(".")[-2] not in ("experts", "router", *NORMS) and name != "norm.scale" else 1
        )
        expert_cut = layout.expert * layout.expert_width if ".experts." in name else 1
        assert count.max() == layout.ranks_per_stage // (tensor_cut * expert_cut), name


def test_cut_leaves_each_rank_its_experts_only() -> None:
    config = tiny_config().model
    whole = make_model(config)
    with torch.device("meta"):
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


def test_another_configuration_on_one_rank_is_refused_before_any_group_is_made() -> None:
    told = run_ranks(3, settings_job)
    assert told == [("rank 1 has another configuration: train.seed is 1, on rank 0 0", False)] * 3


def test_bad_input_that_one_rank_met_before_the_start_reaches_all() -> None:
    assert run_ranks(3, fault_job) == ["rank 2's disk is full"] * 3


def test_ranks_find_the_slow_imports_done() -> None:
    assert run_ranks(1, imported_job) == [True]
