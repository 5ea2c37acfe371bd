"""The layouts `glam parity` tries: read from the command line, each a configuration of its own small run."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from configs.errors import UserError
from configs.layout import layout_faults, nearest_layout
from configs.run import RunConfig
from parallel.topology import Topology

# As the field abbreviates them -> key of the configuration's `parallel`.
SHORT = {
    "dp": "data", "tp": "tensor", "cp": "context", "pp": "pipeline", "ep": "expert", "sp": "sequence",
    "etp": "expert_tensor", "zero": "zero_stage", "schedule": "schedule",
}  # fmt: skip
DEGREES = ("tp", "cp", "pp", "ep", "dp")  # of ranks; the rest are switches
OWN = ("mb", "recompute")  # micro-batches a step, recomputation
MOST_RANKS = 64  # started on one machine
# AdamW divides by the root of the second moment: with the usual 1e-8 a gradient element near zero turns its rounding
# into a whole step. This much larger epsilon lets weights be compared as tightly as gradients.
EPSILON = 1e-3


@dataclass(frozen=True)
class Trial:
    layout: str
    config: RunConfig
    ranks: int


def make_trials(
    config: RunConfig, layouts: Sequence[str], micro_batches: int, full_size: bool, ranks_there: int | None = None
) -> list[Trial]:
    """One trial a layout, all over the same global batch of the same model.

    Args:
        micro_batches: a step, where a layout does not say.
        full_size: keep the model's sizes; otherwise its kinds and proportions only.
        ranks_there: where ranks were launched already, as many as each layout must fill.

    Raises:
        UserError: a layout cannot be read, or cannot carry the model.
    """
    if config.model.moe and config.model.moe.router.kind == "noisy_topk":
        raise UserError(
            "model.moe.router.kind=noisy_topk draws its noise on each rank",
            "a router that decides alike under every layout",
            "add model.moe.router='{kind: topk}' to check the layout; the noise itself is no matter of layouts",
        )
    asked = [_read(text, micro_batches, config.parallel.schedule) for text in layouts or [halved(config)]]
    sequences = math.lcm(*(layout["dp"] * layout["mb"] for layout in asked))
    tree = config.model_dump(mode="json")
    small = tree if full_size else copy.deepcopy(tree)
    if not full_size:
        _shrink(small, asked)
    trials = []
    for text, layout in zip(layouts or [halved(config)], asked):
        _configure(tree, text, layout, sequences)  # refuses what the model itself cannot carry, though a small one may
        trial = _configure(small, text, layout, sequences)
        ranks = layout["dp"] * layout["cp"] * layout["tp"] * layout["pp"]
        if (ranks_there or ranks) != ranks or ranks > (ranks_there or MOST_RANKS):
            raise UserError(
                f"--layout {text}: {ranks} rank(s)",
                f"{ranks_there} rank(s), as launched" if ranks_there else f"at most {MOST_RANKS} on one machine",
                "choose degrees whose product is that",
            )
        if faults := layout_faults(trial, ranks):
            nearest = nearest_layout(trial, ranks)
            remedy = f"the nearest that works on {ranks} rank(s): {nearest}" if nearest else "choose other degrees"
            raise UserError(f"--layout {text}: {'; '.join(faults)}", "a layout that can carry the model", remedy)
        trials.append(Trial(text, trial, ranks))
    return trials


def _read(text: str, micro_batches: int, schedule: str) -> dict[str, Any]:
    """ "tp=2,pp=2" -> degrees; what is not named is 1, or as configured where it is no degree."""
    layout: dict[str, Any] = dict.fromkeys(DEGREES, 1)
    for part in filter(None, (part.strip() for part in text.split(","))):
        key, _, value = part.partition("=")
        if key not in SHORT and key not in OWN:
            known = ", ".join((*SHORT, *OWN))
            raise UserError(f"--layout {text}: {key!r}", f"one of {known}", "write for example tp=2,pp=2,ep=2,dp=2")
        if key != "schedule" and not value.isdecimal():
            raise UserError(f"--layout {text}: {part!r}", f"{key}=<number>", "write for example tp=2,pp=2,ep=2,dp=2")
        layout[key] = value if key == "schedule" else int(value)
        if key in (*DEGREES, "mb") and layout[key] == 0:
            raise UserError(f"--layout {text}: {part!r}", f"{key} of at least 1", "leave it out for 1")
    layout.setdefault("schedule", schedule)
    least = 2 * layout["pp"] if layout["schedule"] == "dualpipev" and layout["pp"] > 1 else 1
    layout.setdefault("mb", max(micro_batches, least))
    return layout


def _configure(tree: dict[str, Any], text: str, layout: dict[str, Any], sequences: int) -> RunConfig:
    flags = ("sequence", "expert_tensor")
    named = {SHORT[key]: value for key, value in layout.items() if key in SHORT}
    parallel = {key: bool(value) if key in flags else value for key, value in named.items()}
    train = tree["train"] | {
        "precision": "float32",
        "batch_tokens": sequences * tree["train"]["sequence_length"],
        "micro_batch_sequences": max(1, sequences // (layout["dp"] * layout["mb"])),
        "optimizer": tree["train"]["optimizer"] | {"epsilon": EPSILON},
    }
    if "recompute" in layout:
        train["recompute"] = bool(layout["recompute"])
    data = tree["data"] | {"heldout": []}
    changed = tree | {"parallel": tree["parallel"] | parallel, "train": train, "data": data}
    return RunConfig.check(changed, where=f"--layout {text}")


def layout_of(topology: Topology) -> str:
    """The degrees of ranks that are there, as `--layout` takes them."""
    degrees = {key: getattr(topology, SHORT[key]) for key in DEGREES}
    return ",".join(f"{key}={degree}" for key, degree in degrees.items() if degree > 1) or "dp=1"


def halved(config: RunConfig) -> str:
    """The configured layout with every degree above 1 brought down to 2: its kind, on few ranks."""
    p = config.parallel
    data = 2 if p.data == "auto" or p.data > 1 else 1
    degrees = {key: data if key == "dp" else min(getattr(p, SHORT[key]), 2) for key in DEGREES}
    return ",".join(f"{key}={degree}" for key, degree in degrees.items() if degree > 1) or "dp=1"


def _shrink(tree: dict[str, Any], asked: Sequence[dict[str, Any]]) -> None:
    """Make the model small in place: its kinds of layers, router, ratios and positions stay, sizes go.

    Sizes stay multiples of the tensor (and context) degrees, and layers and experts enough for the stages and expert
    degrees.
    """
    model, tensor = tree["model"], math.lcm(*(layout["tp"] * layout["cp"] for layout in asked))
    expert = math.lcm(*(layout["ep"] for layout in asked))
    stages = max(layout["pp"] * (2 if layout.get("schedule") == "dualpipev" else 1) for layout in asked)

    def small(size: int, wanted: int) -> int:
        return min(size, -(-wanted // tensor) * tensor)

    attention, moe = model["attention"], model["moe"]
    kv_heads = attention["num_kv_heads"] or attention["num_heads"]
    ratio = min(attention["num_heads"] // kv_heads, 2)
    kv_small = small(kv_heads, 2)
    attention.update(num_heads=kv_small * ratio, num_kv_heads=kv_small, head_width=min(attention["head_width"], 16))
    model.update(vocab_size=small(model["vocab_size"], 128), width=min(model["width"], 48))
    model["ffn"]["width"] = small(model["ffn"]["width"], 72)
    period = moe["every"] if moe else 1
    sparse = attention["sparse"]
    least = max(2 * period, stages, len(sparse["pattern"]) if sparse else 0)
    model["num_layers"] = min(model["num_layers"], least)
    tree["train"]["sequence_length"] = small(tree["train"]["sequence_length"], 128 if sparse else 32)
    if sparse:
        _shrink_blocks(sparse, attention["position"])
    if attention["document_end"] is not None:
        attention["document_end"] = min(attention["document_end"], model["vocab_size"] - 1)
    if moe:
        moe["expert"]["width"] = small(moe["expert"]["width"], 56)
        least = max(4, moe["router"].get("k", 1))
        moe["num_experts"] = min(moe["num_experts"], -(-least // expert) * expert)
        if (capacity := moe["router"].get("capacity")) and capacity["group_tokens"]:
            capacity["group_tokens"] = tree["train"]["sequence_length"]


def _shrink_blocks(sparse: dict[str, Any], position: dict[str, Any]) -> None:
    """Many small blocks, so that a short sequence has some to leave out; what counts in blocks shrinks with them."""
    block, layout = 16, sparse["layout"]
    most = {"sinks": 1, "window": 3, "random": 3, "stride": 4, "segment_tokens": 2 * block, "summary_tokens": 4}
    layout.update({key: min(layout[key], most[key]) for key in most if key in layout})
    sparse["block_size"] = block
    if layout["kind"] == "etc" and position["kind"] == "relative_bias":  # summaries lie behind the bias' reach
        position["max_distance"] = min(position["max_distance"], (layout["window"] - 1) * block + 1)
