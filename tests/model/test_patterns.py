"""Block layouts: what each pattern promises, and that no row depends on the length."""

from __future__ import annotations

import pytest
import torch

from configs.attention import BigBirdLayout, EtcLayout, SparseConfig, StridedLayout, WindowLayout
from model.block_layout import BlockLayout
from model.patterns import block_layout
from tests.model.sparse_cases import BLOCK, LAYOUTS, spec_of


def make(layout: object, rows: int = 24, layer: int = 0, groups: range = range(2), block: int = BLOCK) -> BlockLayout:
    return block_layout(SparseConfig(layout=layout, block_size=block), layer, groups, rows * block)  # type: ignore[arg-type]


def listed(layout: BlockLayout, row: int, group: int = 0) -> list[int]:
    return [block for block in layout.blocks_GRK[group, row].tolist() if block >= 0]


@pytest.mark.parametrize("name", LAYOUTS)
def test_blocks_are_distinct_and_never_ahead_and_end_with_the_rows_own(name: str) -> None:
    layout = make(LAYOUTS[name])
    for group in range(layout.blocks_GRK.shape[0]):
        for row in range(24):
            blocks = listed(layout, row, group)
            ordinary = [block for block in blocks if block < 24]
            assert len(set(blocks)) == len(blocks) and max(ordinary) == row == ordinary[-1]
            assert all(24 <= block < 24 + layout.num_summary_blocks for block in blocks if block >= 24)


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_do_not_depend_on_the_length(name: str) -> None:
    """What a query sees is the same in a sequence of any greater length."""
    long = make(LAYOUTS[name], 24)
    for rows in (1, 2, 3, 7, 11, 23):
        short, position = make(LAYOUTS[name], rows), torch.arange(rows * BLOCK)
        assert torch.equal(short.visible(position, position), long.visible(position, position))


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_query_sees_itself_and_nothing_later(name: str) -> None:
    position = torch.arange(24 * BLOCK)
    visible = make(LAYOUTS[name]).visible(position, position)
    assert visible.diagonal(dim1=2, dim2=3).all() and not visible.triu(1).any()


def test_window() -> None:
    layout = make(WindowLayout(window=3))
    assert listed(layout, 0) == [0] and listed(layout, 1) == [0, 1] and listed(layout, 9) == [7, 8, 9]


def test_bigbird_has_as_many_blocks_as_it_says() -> None:
    """min(i + 1, g + w + r) distinct blocks; the first rows are plain causal attention."""
    layout = make(BigBirdLayout(sinks=2, window=3, random=3))
    for row in range(24):
        blocks = listed(layout, row)
        assert len(blocks) == min(row + 1, 8)
        assert set(range(min(2, row + 1))) | set(range(max(0, row - 2), row + 1)) <= set(blocks)
    assert listed(layout, 7) == list(range(8))


def test_random_blocks_differ_by_layer_head_and_seed_and_spread_over_the_past() -> None:
    def drawn(layer: int, group: int, seed: int = 0) -> list[list[int]]:
        layout = make(BigBirdLayout(sinks=1, window=2, random=2, seed=seed), 400, layer, range(group, group + 1))
        return [listed(layout, row)[1:-2] for row in range(10, 400)]

    one = drawn(0, 0)
    others = drawn(1, 0), drawn(0, 1), drawn(0, 0, 1)
    assert drawn(0, 0) == one
    assert all(sum(a == b for a, b in zip(one, other)) < 20 for other in others)
    # Uniform over what lies between sinks and window: the mean of the places, 0 ... 1, is a half, and no tenth is bare.
    places = torch.tensor([(block - 1) / (row - 2) for row, blocks in enumerate(one, 10) for block in blocks])
    assert 0.45 < places.mean() < 0.55 and torch.histc(places, 10, 0, 1).min() > 40


def test_groups_of_heads_have_the_layout_of_their_number_in_the_whole_model() -> None:
    whole = make(BigBirdLayout(), 40, groups=range(6))
    part = make(BigBirdLayout(), 40, groups=range(4, 6))
    assert torch.equal(whole.blocks_GRK[4:], part.blocks_GRK)


def test_strided_sees_the_last_block_of_every_stride() -> None:
    assert listed(make(StridedLayout(window=2, stride=4)), 18) == [3, 7, 11, 15, 17, 18]


def test_etc_ends_of_segments_are_seen_by_all_later_rows_and_see_their_whole_segment() -> None:
    spec = EtcLayout(sinks=1, window=2, segment_tokens=4 * BLOCK, summary_tokens=3)
    layout, position = make(spec), torch.arange(24 * BLOCK)
    visible = layout.visible(position, position)[0, 0]
    summaries = [t for t in range(24 * BLOCK) if t % (4 * BLOCK) >= 4 * BLOCK - 3]
    for query in (5, 200, 24 * BLOCK - 1):
        row = query // BLOCK
        window = row - 1 if row % 4 != 3 else row - 3
        expected = {
            *range(BLOCK),
            *(t for t in summaries if t < window * BLOCK),
            *range(max(0, window) * BLOCK, query + 1),
        }
        assert set(visible[query].nonzero().flatten().tolist()) == {t for t in expected if t <= query}


def test_density_falls_with_the_length() -> None:
    """Ideal speed-up at b = 64, g2 w3 r3 (spec 3): 4.3 x at 4K, 16 x at 16K, 128 x at 128K."""
    for tokens, speedup in ((4096, 4.3), (8192, 8.3), (16384, 16.0), (131072, 128.0)):
        layout = make(BigBirdLayout(sinks=2, window=3, random=3), tokens // 64, groups=range(1), block=64)
        assert 1 / layout.density() == pytest.approx(speedup, rel=0.03)


def test_documents_follow_the_layout_of_a_sequence_that_starts_with_them() -> None:
    """A document that starts on a block's edge sees what it would see alone."""
    layout = make(BigBirdLayout(sinks=1, window=2, random=2))
    start = torch.zeros(1, 24 * BLOCK, dtype=torch.int64)
    start[:, 9 * BLOCK :] = 9 * BLOCK
    position, alone = torch.arange(24 * BLOCK), torch.arange(15 * BLOCK)
    visible = layout.visible(position, position, start)
    assert torch.equal(visible[:, :, 9 * BLOCK :, 9 * BLOCK :], layout.visible(alone, alone))
    assert not visible[:, :, 9 * BLOCK :, : 9 * BLOCK].any()


@pytest.mark.parametrize(
    ("faulty", "said"),
    [
        ({"block_size": 48}, "block_size"),
        ({"pattern": "SXF"}, "pattern"),
        ({"layout": {"kind": "etc"}}, "segment_tokens"),
        ({"layout": {"kind": "etc", "segment_tokens": 100}}, "no multiple of block_size=64"),
        ({"layout": {"kind": "etc", "segment_tokens": 128, "summary_tokens": 65}}, "exceeds block_size=64"),
        ({"layout": {"kind": "spiral"}}, "spiral"),
        ({"layout": {"kind": "window", "window": 0}}, "window"),
    ],
)
def test_unfit_settings_are_refused(faulty: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SparseConfig.model_validate(faulty)


def test_pattern_strings_tile_over_the_layers() -> None:
    spec = spec_of("window").model_copy(update={"pattern": "SSF"})
    assert [spec.is_sparse(layer) for layer in range(7)] == [True, True, False, True, True, False, True]
