"""Probing the links between ranks: which groups, what arrives, how fast; wrong, slow and silent ranks are named."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch

from parallel import groups, probe
from parallel.probe import ALL_REDUCE, ALL_TO_ALL, MESSAGE, Kind, Measured, Size, compared, kinds_of, measure
from parallel.topology import Topology
from pretrain.local_ranks import run_ranks
from slurm.environ import LaunchEnv
from tests.parallel.gate_jobs import join

FOUR_WAYS = Topology(0, data=2, tensor=2, pipeline=2, expert=2)
SMALL = Size(num_bytes=2**16, repetitions=2, timeout_s=30)


# ---- which groups ---------------------------------------------------------------------------------------------------
def test_every_kind_of_group_of_a_layout() -> None:
    kinds = {kind.name: kind for kind in kinds_of(FOUR_WAYS, tied_ends=True)}
    pairs = ((0, 4), (1, 5), (2, 6), (3, 7))
    assert {name: kind.groups for name, kind in kinds.items()} == {
        "world": (tuple(range(8)),),
        "tensor": ((0, 1), (2, 3), (4, 5), (6, 7)),
        "data, expert replicas": ((0, 2), (1, 3), (4, 6), (5, 7)),  # the same ranks by the same operation: tried once
        "expert": ((0, 1), (2, 3), (4, 5), (6, 7)),
        "pipeline": pairs,
        "tied embedding": pairs,
    }
    assert {kind.operation for kind in kinds.values()} == {ALL_REDUCE, ALL_TO_ALL, MESSAGE}


@pytest.mark.parametrize(
    ("topology", "tied", "experts", "names"),
    [
        (Topology(0, 1), True, True, []),
        (Topology(0, 4), True, False, ["world, data"]),
        (Topology(0, 4, expert=4), False, True, ["world, data", "expert"]),
        (Topology(0, 1, tensor=2, expert=2), False, True, ["world, tensor", "expert"]),
        (Topology(0, 1, tensor=2), False, False, ["world, tensor"]),
        (Topology(0, 2, pipeline=3), True, False, ["world", "data", "pipeline", "pipeline", "tied embedding"]),
        (Topology(0, 2, tensor=2, expert=2, expert_tensor=True), False, True, ["world", "tensor", "data", "expert"]),
        (Topology(0, 1, context=2), False, False, ["world, data x context", "context"]),
        (Topology(0, 2, tensor=2, context=2), False, False, ["world", "tensor", "context", "data x context"]),
        (Topology(0, 1, expert=2, context=2), False, True, ["world, data x context", "context, expert"]),
    ],
)
def test_only_kinds_that_the_layout_uses(topology: Topology, tied: bool, experts: bool, names: list[str]) -> None:
    kinds = kinds_of(topology, tied, experts)
    assert [kind.name for kind in kinds] == names
    for kind in kinds:  # else a rank would have to be in two at once
        members = [rank for ranks in kind.groups for rank in ranks]
        assert len(members) == len(set(members))


def test_stages_in_the_middle_meet_one_neighbour_at_a_time() -> None:
    first, second = (kind.groups for kind in kinds_of(Topology(0, 1, pipeline=4)) if kind.name == "pipeline")
    assert (first, second) == (((0, 1), (2, 3)), ((1, 2),))


# ---- figures --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("operation", "factor"), [(ALL_REDUCE, 1.5), (ALL_TO_ALL, 0.75), (MESSAGE, 1.0)])
def test_bus_bandwidth_is_that_of_nccl_tests(operation: str, factor: float) -> None:
    ranks = (0, 1) if operation == MESSAGE else (0, 1, 2, 3)
    assert Measured("kind", operation, ranks, 10**9, 0.5).bus_bandwidth == pytest.approx(2e9 * factor)


def test_slow_is_below_half_of_the_others() -> None:
    seconds = (1.0, 1.1, 0.9, 2.1)
    found = compared([Measured("kind", ALL_REDUCE, (2 * n, 2 * n + 1), 8, s) for n, s in enumerate(seconds)])
    assert [one.is_slow for one in found] == [False, False, False, True]
    assert found[3].ratio == pytest.approx(1 / 2.1)
    assert not compared(found[:1])[0].is_slow  # nothing to compare it to
    two = compared([replace(found[0], seconds=1.0), replace(found[3], seconds=2.1)])
    assert [one.is_slow for one in two] == [False, True]
    broken = compared([found[0], replace(found[1], fault="broken", seconds=float("inf"))])
    assert not any(one.is_slow for one in broken)


@pytest.mark.parametrize("n", [2, 3, 8, 1024])
def test_patterns_are_what_the_operations_make_of_each_other(n: int) -> None:
    """And exactly so in float32, also over a thousand ranks."""
    length = 8 * n if n < 100 else n
    places = range(n) if n < 100 else (0, 1, n - 1)
    total = sum(probe._pattern(ALL_REDUCE, place, n, length)[0] for place in range(n))
    for place in places:
        assert torch.equal(probe._pattern(ALL_REDUCE, place, n, length)[1], torch.as_tensor(total))
        _, wanted = probe._pattern(ALL_TO_ALL, place, n, length)
        parts = [probe._pattern(ALL_TO_ALL, there, n, length)[0].chunk(n)[place] for there in range(n)]
        assert torch.equal(wanted, torch.cat(parts))
    sent, wanted = zip(*(probe._pattern(MESSAGE, place, 2, length) for place in (0, 1)))
    assert torch.equal(sent[0], wanted[1]) and torch.equal(sent[1], wanted[0]) and not torch.equal(sent[0], sent[1])


# ---- ranks ----------------------------------------------------------------------------------------------------------
def probing_job(env: LaunchEnv) -> list[list[Measured]]:
    """Sound, twice, the second time beside the groups of a run; then with rank 3 wrong, then with rank 5 slow."""
    device = join(env)
    topology = FOUR_WAYS.at(env.rank)
    kinds, original = kinds_of(topology, tied_ends=True), probe.exchange
    found = [measure(kinds, device, SMALL)]
    groups.create(topology, tied_ends=True)
    found.append(measure(kinds, device, SMALL))

    def spoiled(operation: str, links: Any, sent: torch.Tensor, out: torch.Tensor) -> None:
        original(operation, links, sent, out)
        if env.rank == 3 and operation == ALL_REDUCE:
            out[5] += 1

    def slowed(operation: str, links: Any, sent: torch.Tensor, out: torch.Tensor) -> None:
        if env.rank == 5:
            time.sleep(0.05)
        original(operation, links, sent, out)

    for changed in (spoiled, slowed):
        probe.exchange = changed
        found.append(measure(kinds, device, SMALL))
    groups.stop()
    return found


@pytest.fixture(scope="module")
def probed() -> list[list[list[Measured]]]:
    return run_ranks(8, probing_job)


@pytest.mark.parametrize("time_", [0, 1])
def test_sound_links(probed: list[list[list[Measured]]], time_: int) -> None:
    found = probed[0][time_]
    assert len(found) == 1 + 5 * 4 and not [one.fault for one in found if one.fault]
    assert all(1e3 < one.bus_bandwidth < 1e12 for one in found)


def test_all_ranks_hear_the_same(probed: list[list[list[Measured]]]) -> None:
    assert all(rank == probed[0] for rank in probed)


def test_a_rank_with_wrong_sums_is_named(probed: list[list[list[Measured]]]) -> None:
    found = probed[0][2]
    faulty = {(one.kind, one.ranks): one.fault for one in found if one.fault}
    assert {ranks for _, ranks in faulty} == {tuple(range(8)), (2, 3), (1, 3), (3, 7)}
    for text in faulty.values():
        assert text.startswith("rank(s) 3: all-reduce gave wrong values: 1 of ") and "the first at 5" in text


def test_slow_groups_share_the_slow_rank(probed: list[list[list[Measured]]]) -> None:
    slow = [one.ranks for one in probed[0][3] if one.is_slow]
    assert set(slow) >= {(4, 5), (5, 7), (1, 5)} and all(5 in ranks for ranks in slow)


def silent_job(env: LaunchEnv) -> tuple[list[Measured], float]:
    """Rank 2 comes to no all-reduce of its pair."""
    device, original = join(env), probe.exchange

    def silent(operation: str, links: Any, sent: torch.Tensor, out: torch.Tensor) -> None:
        if env.rank != 2:
            original(operation, links, sent, out)

    probe.exchange = silent
    began = time.perf_counter()
    found = measure([Kind("tensor", ALL_REDUCE, ((0, 1), (2, 3)))], device, replace(SMALL, timeout_s=2))
    seconds = time.perf_counter() - began
    groups.stop()
    return found, seconds


def test_a_silent_rank_is_told_and_waited_for_no_longer_than_agreed() -> None:
    [([sound, broken], seconds), *_] = run_ranks(4, silent_job)
    assert sound.fault == "" and broken.ranks == (2, 3)
    assert "rank(s) 3: failed: RuntimeError: " in broken.fault, broken.fault
    assert seconds < 20
