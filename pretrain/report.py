"""Pictures of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

from pretrain.metrics_file import read_metrics

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def plot_run(run_dir: Path) -> Path:
    """Draw loss (training and held-out), learning rate, gradient norm and router load into RUN/loss.png."""
    records = read_metrics(run_dir)
    train = [r for r in records if r["kind"] == "train"]
    heldout = [r for r in records if r["kind"] == "eval"]
    loads = sorted({key for r in train for key in r if key.endswith("/max_over_mean")})
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), constrained_layout=True)
    (loss, norm), (rate, load) = axes
    _line(loss, train, "loss", "training")
    _line(loss, heldout, "loss", "held-out", marker="o")
    _line(norm, train, "grad_norm", "before clipping")
    _line(rate, train, "lr", "learning rate")
    for key in loads:
        _line(load, train, key, key.split("/")[0].replace("_", " "))
    titles = (
        (loss, "loss, nats a token"),
        (norm, "gradient norm"),
        (rate, "learning rate"),
        (load, "router load, max / mean"),
    )
    for axis, title in titles:
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(fontsize=8)
    marks = {"resumed": ("grey", ":"), "skipped": ("grey", "-"), "rolled_back": ("firebrick", "--")}
    for event in (r for r in records if r["kind"] == "event" and r["event"] in marks):
        colour, style = marks[event["event"]]
        for axis in axes.flat:
            axis.axvline(event["step"], color=colour, linestyle=style, linewidth=0.8)
    shown = "dotted: resumed, solid grey: step skipped, dashed red: rolled back to here"
    figure.suptitle(f"{run_dir.name}   ({shown})")
    path = run_dir / "loss.png"
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path


def _line(axis: Any, records: list[dict[str, Any]], key: str, label: str, **style: Any) -> None:
    points = [(r["step"], r[key]) for r in records if isinstance(r.get(key), int | float)]
    if points:
        axis.plot(*zip(*points), label=label, **style)
