"""Block-sparse layouts that a run cannot have: said at configuration time, with both values."""

from __future__ import annotations

import pytest

from configs.errors import UserError
from tests.tiny import tiny_config

LENGTH = ("train.sequence_length=128", "train.batch_tokens=256")
ROTARY = "model.attention.position={kind: rotary}"


@pytest.mark.parametrize(
    ("sparse", "said"),
    [
        ("block_size: 20", "block_size"),
        ("block_size: 128", "block_size=128 is too large.*train.sequence_length=128 has 1 whole blocks"),
        ("block_size: 32", "sinks . window . random = 7 blocks.*128 has 4 whole blocks of 32"),
        ("block_size: 16, layout: {kind: etc}", "segment_tokens"),
        ("block_size: 16, layout: {kind: etc, segment_tokens: 96}", "segment_tokens=96: no summary is older"),
        ("block_size: 16, layout: {kind: etc, segment_tokens: 32, window: 8}", "sinks . window = 9 blocks"),
        ("block_size: 16, layout: {kind: strided, stride: 6}", "stride=6 blocks.*window of 3.*8 whole blocks of 16"),
        ("block_size: 16, pattern: FFFFS", "pattern=FFFFS marks none of model.num_layers=4"),
        ("block_size: 32, kernel: flex", "kernel=flex wants blocks of 64 tokens at least, block_size=32"),
    ],
)
def test_layouts_that_do_not_fit_are_refused(sparse: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        tiny_config(f"model.attention.sparse={{{sparse}}}", ROTARY, *LENGTH)


def test_summaries_must_lie_beyond_the_relative_bias() -> None:
    etc = "model.attention.sparse={block_size: 16, layout: {kind: etc, segment_tokens: 32}}"
    with pytest.raises(UserError, match=r"33 tokens on.*max_distance=128"):
        tiny_config(etc, *LENGTH)
    near = "model.attention.position={kind: relative_bias, num_buckets: 8, max_distance: 33}"
    tiny_config(etc, near, *LENGTH)


def test_what_fits_is_taken() -> None:
    for fit in (
        "",
        ", layout: {kind: strided, stride: 5}",
        ", layout: {kind: etc, segment_tokens: 80}",
        ", pattern: FFFS",
    ):
        tiny_config(f"model.attention.sparse={{block_size: 16{fit}}}", ROTARY, *LENGTH)


def test_a_bias_needs_distances_beyond_its_exact_buckets() -> None:
    with pytest.raises(UserError, match="max_distance=16 must exceed num_buckets / 2 = 16"):
        tiny_config("model.attention.position={kind: relative_bias, max_distance: 16}")
