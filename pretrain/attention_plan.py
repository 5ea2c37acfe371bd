"""What a configuration's attention can see: density, reach in layers, ideal speed-up, and a picture of it.

R row blocks of the training length.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from configs.attention import SparseConfig
from configs.errors import UserError
from configs.run import RunConfig
from model.block_layout import BlockLayout
from model.patterns import block_layout

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HEADS_SHOWN = 3


@dataclass(frozen=True)
class AttentionPlan:
    """Figures of one configuration at its training length."""

    tokens: int
    block_size: int
    sparse_layers: int
    full_layers: int
    density: float  # blocks looked at in a sparse layer, of those of full causal attention
    speedup: float  # ideal, of a sparse layer's attention
    seen: tuple[float, ...]  # share of all pairs (token, earlier token) connected after 1, 2 ... layers
    reach: int | None  # layers until every token can hear of every earlier one; None: not within the model

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def plan_attention(config: RunConfig) -> AttentionPlan:
    """
    Raises:
        UserError: the configuration's attention is full.
    """
    model, length = config.model, config.train.sequence_length
    spec = sparse_of(config)
    sparse = sum(spec.is_sparse(layer) for layer in range(model.num_layers))
    layout = block_layout(spec, 0, range(model.attention.kv_heads), length)
    seen = connected_shares(spec, model.attention.kv_heads, length, model.num_layers)
    reach = next((number for number, share in enumerate(seen, 1) if share == 1.0), None)
    return AttentionPlan(
        length, spec.block_size, sparse, model.num_layers - sparse, layout.density(), 1 / layout.density(), seen, reach
    )


def sparse_of(config: RunConfig) -> SparseConfig:
    spec = config.model.attention.sparse
    if spec is None:
        raise UserError(
            "model.attention.sparse is not set: every layer sees all of its past",
            "a block-sparse layout to draw",
            "set it, for instance model.attention.sparse.layout.kind=bigbird (docs/long_context.md)",
        )
    return spec


def connected_shares(spec: SparseConfig, groups: int, length: int, num_layers: int) -> tuple[float, ...]:
    """Share of pairs (block, earlier block) between which something can pass within 1, 2 ... layers, by way of any
    head; ends with the first 1.0."""
    shares, rows = list[float](), -(-length // spec.block_size)
    reached_RR: Tensor | None = None
    for layer in range(num_layers):
        step_RR = torch.ones(rows, rows).tril()
        if spec.is_sparse(layer):
            step_RR = looks_at(block_layout(spec, layer, range(groups), length)).any(0).float()
        reached_RR = step_RR if reached_RR is None else (step_RR @ reached_RR > 0).float()
        shares.append(float(reached_RR.sum()) / (rows * (rows + 1) / 2))
        if shares[-1] == 1.0:
            break
    return tuple(shares)


def looks_at(layout: BlockLayout) -> Tensor:
    """bool [G or 1, R, R]: the blocks of which each row sees something: all of them, or a summary."""
    seen_GRR = layout.seen_GRR()
    if layout.has_summaries:
        rows = layout.num_rows
        has_summary = torch.zeros(rows, dtype=torch.bool)
        has_summary[layout.summary_T // layout.block_size] = True
        seen_GRR = seen_GRR | (has_summary & (torch.arange(rows) < layout.local_R[:, None]))
    return seen_GRR


def print_plan(plan: AttentionPlan, picture: Path) -> None:
    table = Table(title="attention")
    table.add_column("what")
    table.add_column("how much", justify="right")
    table.add_row("layers: block-sparse, full", f"{plan.sparse_layers}, {plan.full_layers}")
    table.add_row("tokens, a block", f"{plan.tokens:,}, {plan.block_size}")
    table.add_row("density of a sparse layer", f"{plan.density:.2%}")
    table.add_row("ideal speed-up of its attention", f"{plan.speedup:.1f} x")
    if plan.reach:
        table.add_row("every token hears of every earlier one", f"after {plan.reach} layers")
    else:
        table.add_row("pairs of tokens connected by the last layer", f"{plan.seen[-1]:.1%}")
    table.add_row("picture", str(picture))
    Console().print(table)


def draw(config: RunConfig, plan: AttentionPlan, path: Path) -> None:
    """A picture of the first sparse layer's heads, and of what becomes connected from layer to layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    spec, groups = sparse_of(config), config.model.attention.kv_heads
    layer = next(layer for layer in range(config.model.num_layers) if spec.is_sparse(layer))
    seen_GRR = looks_at(block_layout(spec, layer, range(groups), plan.tokens))
    shown = min(HEADS_SHOWN, seen_GRR.shape[0])
    figure, axes = plt.subplots(1, shown + 1, figsize=(4.2 * (shown + 1), 4.4), constrained_layout=True)
    for head, axis in enumerate(axes[:-1]):
        _draw_head(axis, seen_GRR[head])
        alike = seen_GRR.shape[0] == 1 and groups > 1
        title = "all heads" if alike else f"key-value head {head}"
        axis.set(title=title, xlabel="key block", xlim=(-0.03 * seen_GRR.shape[1], seen_GRR.shape[1]))
    axes[0].set_ylabel(f"row block of {spec.block_size} tokens")
    axes[-1].plot(range(1, len(plan.seen) + 1), plan.seen, marker="o")
    axes[-1].set(title="pairs of tokens connected", xlabel="layers", ylim=(0, 1.05))
    axes[-1].grid(alpha=0.3)
    figure.suptitle(f"{config.name}: {spec.layout.kind}, layer {layer}, {plan.density:.1%} of full causal attention")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_head(axis: Axes, seen_RR: Tensor) -> None:
    rows = seen_RR.shape[0]
    picture = seen_RR.float() + 0.12 * torch.ones(rows, rows).tril()
    axis.imshow(
        picture.numpy(), cmap="Blues", interpolation="nearest" if rows <= 256 else "antialiased", vmin=0, vmax=1
    )
