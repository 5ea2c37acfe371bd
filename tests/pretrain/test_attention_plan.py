"""`glam plan --attention`: reach in layers, by the published arithmetic; the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.attention import BigBirdLayout, EtcLayout, LayoutConfig, SparseConfig, StridedLayout, WindowLayout
from configs.errors import UserError
from pretrain.attention_plan import connected_shares, draw, plan_attention
from pretrain.cli import main
from tests.tiny import tiny_config

LONG = ("train.sequence_length=256", "train.batch_tokens=512")


@pytest.mark.parametrize(
    ("layout", "layers"),
    [
        (WindowLayout(window=3), range(256, 257)),
        (BigBirdLayout(sinks=2, window=3, random=0), range(255, 256)),
        (BigBirdLayout(sinks=0, window=3, random=3), range(10, 15)),
        (BigBirdLayout(sinks=2, window=3, random=3), range(10, 15)),
        (StridedLayout(window=3, stride=8), range(5, 6)),
        (EtcLayout(sinks=2, window=3, segment_tokens=128), range(2, 6)),
    ],
    ids=lambda value: value.kind if hasattr(value, "kind") else "",
)
def test_layers_until_every_token_hears_of_every_earlier_one(layout: LayoutConfig, layers: range) -> None:
    """At 512 blocks and one head (spec 3.5)."""
    shares = connected_shares(SparseConfig(layout=layout, block_size=16), 1, 512 * 16, 300)
    assert shares[-1] == 1.0 and len(shares) in layers


def test_a_full_layer_connects_everything() -> None:
    spec = SparseConfig(layout=WindowLayout(window=2), block_size=16, pattern="SSF")
    assert len(connected_shares(spec, 2, 64 * 16, 9)) == 3


def test_plan_and_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config("model.attention.sparse={block_size: 16, pattern: SSF}", *LONG, f"run_dir={tmp_path}/run")
    plan = plan_attention(config)
    assert (plan.sparse_layers, plan.full_layers) == (3, 1) and plan.reach in (2, 3)  # a full layer is the third
    assert plan.density * plan.speedup == pytest.approx(1)
    draw(config, plan, tmp_path / "there" / "attention.png")
    assert (tmp_path / "there" / "attention.png").read_bytes()[:4] == b"\x89PNG"
    (tmp_path / "config.yaml").write_text(config.dump())
    assert main(["plan", "--attention", "--json", str(tmp_path / "config.yaml")]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["reach"] == plan.reach and Path(told["picture"]).exists()


def test_full_attention_has_nothing_to_draw() -> None:
    with pytest.raises(UserError, match="sparse is not set"):
        plan_attention(tiny_config())
