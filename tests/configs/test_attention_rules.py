"""Block-sparse layouts that a run cannot have: said at configuration time, with both values."""

from __future__ import annotations

import pytest

from configs.errors import UserError
from tests.tiny import tiny_config

LENGTH = ("train.sequence_length=128", "train.batch_tokens=256")


@pytest.mark.parametrize(
    ("sparse", "said"),
    [
        ("{block_size: 128}", "block_size=128 is too large.*train.sequence_length=128 has 1 whole blocks"),
        ("{block_size: 32}", "sinks . window . random = 7 blocks.*128 has 4 whole blocks of 32"),
        ("{block_size: 16, layout: {kind: etc, segment_tokens: 128, window: 9}}", "segment_tokens=128: no second"),
        ("{block_size: 16, layout: {kind: strided, stride: 8}}", "stride=8 blocks.*8 whole blocks of 16"),
        ("{block_size: 16, layout: {kind: etc}}", "segment_tokens"),
        ("{block_size: 16, layout: {kind: etc, segment_tokens: 32, window: 2}}", "17 tokens on.*max_distance=128"),
        ("{block_size: 20}", "block_size"),
    ],
)  # fmt: skip
def test_layouts_that_do_not_fit_are_refused(sparse: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        tiny_config(f"model.attention.sparse={sparse}", *LENGTH)


def test_what_fits_is_taken() -> None:
    tiny_config("model.attention.sparse={block_size: 16, layout: {kind: etc, segment_tokens: 32, window: 9}}", *LENGTH)
    tiny_config("model.attention.sparse={block_size: 16}", *LENGTH)
