"""What the chunked loss over a large vocabulary costs in time and saves in memory, beside all logits at once.

T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import report
from benchmarks.timing import in_fresh_process, paired_times, peak_bytes
from model.loss import language_model_loss, plain_language_model_loss

MODULE = "benchmarks.vocabulary_loss"
BASE = "all logits at once"
OURS = "ours, chunked"
COLUMNS = {
    "case": "case",
    "candidate": "candidate",
    "milliseconds": "ms",
    "ratio": "x plain",
    "spread": "+/-",
    "target": "target",
    "peak_mb": "peak MB",
    "memory_ratio": "MB x plain",
    "memory_target": "target",
    "difference": "loss off by",
    "note": "note",
}


@dataclass(frozen=True)
class Size:
    tokens: int
    vocabulary: int
    width: int
    logit_bytes: int  # of a chunk of ours
    rounds: int
    dtypes: tuple[str, ...]


SIZES = {
    # 2 GiB of float32 logits, four chunks
    "full": Size(2048, 262_144, 256, 512 * 2**20, 5, ("float32", "bf16")),
    "quick": Size(512, 65_536, 128, 32 * 2**20, 5, ("float32",)),
    "smoke": Size(256, 4096, 32, 2**20, 2, ("float32",)),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = report.make_parser(
        "vocabulary_loss",
        (__doc__ or "").split("\n\n")[0],
        "OMP_NUM_THREADS=2 python -m benchmarks.vocabulary_loss --dtypes bf16 --tokens 4096",
    )
    parser.add_argument("--dtypes", nargs="+", choices=list(report.DTYPES), help="(default: both; float32 if --quick)")
    parser.add_argument("--tokens", type=int, help="tokens in one call")
    parser.add_argument("--width", type=int)
    parser.add_argument("--memory-of", nargs=2, metavar=("CANDIDATE", "DTYPE"), help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    device = report.set_up(parsed)
    spec = SIZES[report.size_of(parsed)]
    tokens, width = parsed.tokens or spec.tokens, parsed.width or spec.width
    spec = Size(tokens, spec.vocabulary, width, spec.logit_bytes, spec.rounds, spec.dtypes)
    if parsed.memory_of:
        name, dtype = parsed.memory_of
        print(_measure_memory(name, dtype, spec, device))
        return 0
    result = report.Report("vocabulary_loss", report.size_of(parsed), report.machine_facts(device, parsed))
    with report.output_kept_clean():
        for dtype in report.chosen(parsed.dtypes, spec.dtypes):
            result.rows.extend(_measure(dtype, spec, parsed, device))
    result.notes.append(
        f"{spec.tokens} tokens, {spec.vocabulary} vocabulary entries, width {spec.width}, "
        f"{spec.logit_bytes / 2**20:.3g} MiB of logits a chunk; forward + backward. "
        "peak MB: held at the fullest beyond inputs and their gradients. "
        "loss off by: from the loss summed in float64, relative."
    )
    result.print(parsed.json, COLUMNS)
    return 0


def _candidates(hidden_TD: Tensor, weight_VD: Tensor, label_T: Tensor, spec: Size) -> dict[str, Callable[[], Tensor]]:
    found: dict[str, Callable[[], Tensor]] = {
        BASE: lambda: plain_language_model_loss(hidden_TD, weight_VD, label_T),
        OURS: lambda: language_model_loss(hidden_TD, weight_VD, label_T, logit_bytes=spec.logit_bytes)[0],
    }
    # torch's own, from 2.13 on.
    function: Any = getattr(F, "linear_cross_entropy", None)
    options: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is not None and options is not None:
        chunk = max(1, spec.logit_bytes // (4 * spec.vocabulary))
        found["torch linear_cross_entropy"] = lambda: function(
            hidden_TD, weight_VD, label_T, options=options(batch_chunk_size=chunk)
        )
    return found


def _measure(
    dtype: str, spec: Size, parsed: argparse.Namespace, device: torch.device
) -> list[dict[str, report.Figure]]:
    hidden_TD, weight_VD, label_T = _inputs(dtype, spec, device)
    truth = _true_loss(hidden_TD, weight_VD, label_T)
    rows: dict[str, dict[str, report.Figure]] = {}
    steps: dict[str, Callable[[], None]] = {}
    for name, loss in _candidates(hidden_TD, weight_VD, label_T, spec).items():
        rows[name] = {"case": dtype, "dtype": dtype, "candidate": name}
        try:
            with torch.no_grad():
                value = float(loss())
            steps[name] = _step(loss, hidden_TD, weight_VD)
            steps[name]()
        except Exception as error:  # torch's own is new and does not run everywhere
            rows[name]["note"] = f"did not run: {type(error).__name__}: {error}"[:100]
            steps.pop(name, None)
            continue
        rows[name]["difference"] = abs(value - truth) / truth
        if abs(value - truth) / truth > 1e-2:
            rows[name]["note"] = "wrong loss"
    times = paired_times(steps, report.rounds_for(parsed, {report.size_of(parsed): spec.rounds}), device, limit_s=120.0)
    weighed = [name for name in steps if name in (BASE, OURS) or not parsed.smoke]  # each takes a process of its own
    memory = {name: _memory(name, dtype, spec, parsed, device) for name in weighed}
    for name in steps:
        rows[name] |= {
            "milliseconds": times.median(name) * 1e3,
            "ratio": times.ratio(name, BASE),
            "spread": times.spread(name, BASE),
        }
        if name in memory:
            rows[name] |= {"peak_mb": report.megabytes(memory[name]), "memory_ratio": memory[name] / memory[BASE]}
    rows[OURS] |= {"target": 1.3, "memory_target": 0.21}
    return list(rows.values())


def _memory(name: str, dtype: str, spec: Size, parsed: argparse.Namespace, device: torch.device) -> int:
    if device.type == "cuda":
        return _measure_memory(name, dtype, spec, device)
    sizes = ["--tokens", str(spec.tokens), "--width", str(spec.width)]
    return int(in_fresh_process(MODULE, [*report.repeated(parsed), *sizes, "--memory-of", name, dtype]))


def _measure_memory(name: str, dtype: str, spec: Size, device: torch.device) -> int:
    hidden_TD, weight_VD, label_T = _inputs(dtype, spec, device)
    # A small call first: what libraries set up once is no need of a step.
    few_TD, few_VD = hidden_TD[:8].detach().requires_grad_(), weight_VD[:512].detach().requires_grad_()
    _step(_candidates(few_TD, few_VD, label_T[:8] % 512, spec)[name], few_TD, few_VD)()
    step = _step(_candidates(hidden_TD, weight_VD, label_T, spec)[name], hidden_TD, weight_VD)
    gradients = sum(t.numel() * t.element_size() for t in (hidden_TD, weight_VD))
    return max(1, peak_bytes(step, device) - gradients)


def _step(loss: Callable[[], Tensor], hidden_TD: Tensor, weight_VD: Tensor) -> Callable[[], None]:
    def step() -> None:
        hidden_TD.grad = weight_VD.grad = None
        loss().backward()

    return step


def _inputs(dtype: str, spec: Size, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden_TD = torch.randn(spec.tokens, spec.width, generator=generator)
    weight_VD = torch.randn(spec.vocabulary, spec.width, generator=generator) * spec.width**-0.5
    label_T = torch.randint(0, spec.vocabulary, (spec.tokens,), generator=generator)
    kind = report.DTYPES[dtype]
    return hidden_TD.to(device, kind).requires_grad_(), weight_VD.to(device, kind).requires_grad_(), label_T.to(device)


def _true_loss(hidden_TD: Tensor, weight_VD: Tensor, label_T: Tensor) -> float:
    """In float32 products and float64 sums, a few tokens at a time."""
    with torch.no_grad():
        weight = weight_VD.float()
        parts = [
            F.cross_entropy(F.linear(hidden.float(), weight).double(), label, reduction="sum")
            for hidden, label in zip(hidden_TD.split(64), label_T.split(64))
        ]
        return float(torch.stack(parts).sum()) / len(label_T)


if __name__ == "__main__":
    sys.exit(main())
