"""The order of samples: a bijection for any length, another for another key, and no memory."""

from __future__ import annotations

import time
import tracemalloc
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pretrain.permute import KeyedPermutation


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.text(max_size=80))
@example(1, "")
@example(2, "k")
@example(256, "k")  # a power of two: nothing to walk past
@example(257, "k")
def test_bijection_of_any_length(n: int, key: str) -> None:
    order = KeyedPermutation(n, key)
    assert sorted(order(position) for position in range(n)) == list(range(n))


@settings(max_examples=40, deadline=None)
@given(st.integers(50, 10**12), st.text(max_size=120), st.text(max_size=3), st.text(max_size=3))
@example(1000, "x" * 70, "/0", "/1")  # the epoch stands at the end of the key, however long the source's name is
def test_another_key_is_another_order(n: int, prefix: str, end: str, other_end: str) -> None:
    one, other = KeyedPermutation(n, prefix + end), KeyedPermutation(n, prefix + other_end)
    same = all(one(position) == other(position) for position in range(40))
    assert same == (end == other_end)


def test_a_long_key_still_mixes() -> None:
    """Rounds are keyed apart by what follows the key; were that cut off, the rounds would be one and the same."""
    n = 1 << 12
    order = KeyedPermutation(n, "name" * 40)
    assert sum(abs(order(i + 1) - order(i)) == 1 for i in range(n - 1)) < 12
    assert sum(order(order(i)) == i for i in range(n)) < 20


def test_no_order_at_all_to_the_eye() -> None:
    """Fixed points and kept neighbours of a random permutation are Poisson with means 1 and 2; positions and values
    are uncorrelated (standard error n^-0.5)."""
    n = 5000
    values = [KeyedPermutation(n, "0/web/0")(position) for position in range(n)]
    assert sum(value == position for position, value in enumerate(values)) < 10
    assert sum(abs(b - a) == 1 for a, b in pairwise(values)) < 15
    mean = (n - 1) / 2
    spread = (n * n - 1) / 12
    correlation = sum((i - mean) * (v - mean) for i, v in enumerate(values)) / n / spread
    assert abs(correlation) < 5 / n**0.5
    halves = sum(value < n / 2 for value in values[: n // 2]) / (n // 2)
    assert abs(halves - 0.5) < 0.05


def test_costs_nothing_to_open() -> None:
    """A trillion samples: no table is made."""
    tracemalloc.start()
    began = time.perf_counter()
    order = KeyedPermutation(10**12, "key")
    found = {order(position) for position in range(0, 10**12, 10**10)}
    seconds, (_, peak) = time.perf_counter() - began, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 100 and all(0 <= value < 10**12 for value in found)
    assert peak < 100_000 and seconds < 1.0


def test_refuses_what_is_outside() -> None:
    for n in (0, -1):
        with pytest.raises(ValueError, match=str(n)):
            KeyedPermutation(n, "key")
    for position in (-1, 10):
        with pytest.raises(IndexError, match=str(position)):
            KeyedPermutation(10, "key")(position)
