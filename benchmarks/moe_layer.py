"""How fast is our mixture-of-experts layer: forward and backward beside a dense layer of equal active FLOPs (the
limit), DeepSpeed, Megatron-core and transformers.

Every layer of a case has the same weights and input, so the same load; each trains with its own auxiliary loss.
T tokens, D width, F ffn width, E experts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks import report
from benchmarks.moe_peers import SEQUENCES, Candidate, K, Layer, Weights, candidates, draw_weights
from benchmarks.timing import Times, in_fresh_process, paired_times, peak_bytes

MODULE = "benchmarks.moe_layer"
COLUMNS = {
    "case": "case",
    "candidate": "candidate",
    "load": "load",
    "milliseconds": "ms",
    "ratio": "x dense",
    "spread": "+/-",
    "target": "target",
    "peak_mb": "peak MB",
    "memory_ratio": "MB x dense",
    "difference": "difference",
    "note": "note",
}


@dataclass(frozen=True)
class Case:
    """One size and load."""

    name: str
    num_experts: int
    load_max_over_mean: float | None  # None: as the drawn router has it
    target: float  # wanted of ours, x dense


@dataclass(frozen=True)
class Size:
    tokens: int
    width: int
    cases: tuple[Case, ...]
    rounds: int
    dtypes: tuple[str, ...]
    limit_s: float  # of timing one case


def size(name: str) -> Size:
    cases = (Case("E=8", 8, None, 1.10), Case("E=16 skewed", 16, 6.0, 1.20), Case("E=64", 64, None, 1.35))
    if name == "full":
        return Size(4096, 256, cases, 11, ("float32", "bf16"), 120.0)
    if name == "quick":
        return Size(1024, 128, cases, 5, ("float32",), 5.0)
    return Size(128, 32, (Case("E=4 skewed", 4, 1.5, 1.20),), 2, ("float32",), 5.0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = report.make_parser(
        "moe_layer", (__doc__ or "").split("\n\n")[0], "OMP_NUM_THREADS=2 python -m benchmarks.moe_layer --dtypes bf16"
    )
    parser.add_argument("--dtypes", nargs="+", choices=list(report.DTYPES), help="(default: both; float32 if --quick)")
    parser.add_argument("--cases", nargs="+", metavar="E=8", help="only these cases, by name")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only candidates whose name holds one of these words")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--memory-of", nargs=3, metavar=("CANDIDATE", "CASE", "DTYPE"), help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    device = report.set_up(parsed)
    spec = size(report.size_of(parsed))
    if parsed.memory_of:
        with report.output_kept_clean():
            name, case_name, dtype = parsed.memory_of
            found = _measure_memory(name, case_name, dtype, spec, device)
        print(found)
        return 0
    result = report.Report("moe_layer", report.size_of(parsed), report.machine_facts(device, parsed))
    with report.output_kept_clean():
        for dtype in report.chosen(parsed.dtypes, spec.dtypes):
            for case in spec.cases:
                if not parsed.cases or case.name in parsed.cases:
                    result.rows.extend(_measure_case(case, dtype, spec, parsed, device))
    result.notes.extend(
        (
            f"{spec.tokens} tokens, width {spec.width}, experts of {4 * spec.width}, top-{K}, forward + backward; "
            "x dense: of the dense layer of the same kind, gated or not.",
            "load: choices of the fullest expert over the mean. peak MB: held at the fullest beyond input, weights and "
            "their gradients. difference: largest of the output from ours, x its root mean square; in bf16 without "
            "the tenth of the tokens that differs most (near ties).",
        )
    )
    result.print(parsed.json, COLUMNS)
    return 0


def _measure_case(
    case: Case, dtype: str, spec: Size, parsed: argparse.Namespace, device: torch.device
) -> list[dict[str, report.Figure]]:
    wanted = [c for c in candidates() if _asked_for(c, parsed)]
    weights = {gated: _weights(case, gated, dtype, spec, device) for gated in {c.gated for c in wanted}}
    x_TD = _input(case, next(iter(weights.values())), spec)
    grad_TD = torch.randn(x_TD.shape, generator=torch.Generator().manual_seed(3)).to(x_TD)
    steps: dict[str, Callable[[], None]] = {}
    references: dict[bool, Tensor] = {}
    rows: dict[str, dict[str, report.Figure]] = {}
    load = round(_load(x_TD, weights[wanted[0].gated].router_ED), 2)
    for candidate in wanted:
        row: dict[str, report.Figure] = {
            "case": f"{case.name} {dtype}",
            "dtype": dtype,
            "candidate": candidate.name,
            "load": load,
        }
        rows[candidate.name] = row
        try:
            layer = candidate.build(weights[candidate.gated])
            output = layer(x_TD)[0].detach()
        except Exception as error:  # a peer that cannot run here must not end the comparison of the others
            row["note"] = (
                f"did not run: {type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''}"
            )
            continue
        steps[candidate.name] = _step(layer, x_TD, grad_TD)
        if candidate.name.startswith("ours"):
            references[candidate.gated] = output
            row["target"] = case.target
        elif candidate.dropless and candidate.gated in references:
            difference = _difference(output.float(), references[candidate.gated].float(), dtype)
            row["difference"] = difference
            if difference > (1e-3 if dtype == "float32" else 0.2):
                row["note"] = "differs from ours"
    times = paired_times(
        steps, report.rounds_for(parsed, {report.size_of(parsed): spec.rounds}), device, 1, spec.limit_s
    )
    memory = {} if parsed.no_memory else _memory(case, dtype, spec, parsed, device, steps, [c.name for c in wanted])
    for candidate in wanted:
        if candidate.name in steps:
            rows[candidate.name].update(_figures(candidate, times, memory))
    return list(rows.values())


def _difference(output_TD: Tensor, reference_TD: Tensor, dtype: str) -> float:
    """Largest difference x the root mean square of the reference. In bf16 over the 9 tokens of 10 that agree best:
    peers that score experts in bf16 send some near ties elsewhere."""
    worst_T = (output_TD - reference_TD).abs().amax(1) / reference_TD.square().mean().sqrt()
    return float(worst_T.quantile(0.9 if dtype == "bf16" else 1.0))


def _figures(candidate: Candidate, times: Times, memory: dict[str, int]) -> dict[str, report.Figure]:
    base, name = "dense, gated" if candidate.gated else "dense", candidate.name
    figures: dict[str, report.Figure] = {"milliseconds": times.median(name) * 1e3}
    if base in times.seconds:
        figures |= {"ratio": times.ratio(name, base), "spread": times.spread(name, base)}
    if name in memory:
        figures["peak_mb"] = report.megabytes(memory[name])
        if memory.get(base):
            figures["memory_ratio"] = memory[name] / memory[base]
    return figures


def _memory(
    case: Case,
    dtype: str,
    spec: Size,
    parsed: argparse.Namespace,
    device: torch.device,
    steps: dict[str, Callable[[], None]],
    names: Sequence[str],
) -> dict[str, int]:
    """Peak bytes of each candidate; at small sizes of ours and the limit only, as each takes a process of its own."""
    if device.type == "cuda":
        return {name: _measure_memory(name, case.name, dtype, spec, device) for name in steps}
    few = {"quick": ("dense", "ours"), "smoke": ("ours",)}.get(report.size_of(parsed))
    if few and case is not spec.cases[0]:
        return {}
    return {
        name: int(in_fresh_process(MODULE, [*report.repeated(parsed), "--memory-of", name, case.name, dtype]))
        for name in names
        if name in steps and (not few or name in few)
    }


def _measure_memory(name: str, case_name: str, dtype: str, spec: Size, device: torch.device) -> int:
    """Bytes beyond input, weights and gradients of one step of one candidate."""
    candidate = next(c for c in candidates() if c.name == name)
    case = next(c for c in spec.cases if c.name == case_name)
    weights = _weights(case, candidate.gated, dtype, spec, device)
    x_TD = _input(case, weights, spec)
    layer, grad_TD = candidate.build(weights), torch.ones_like(x_TD)
    # A small step first: what libraries set up once is no need of a step.
    few = slice(0, 8 * SEQUENCES)
    _step(layer, x_TD[few].detach().requires_grad_(), grad_TD[few].clone())()
    for parameter in layer.parameters():
        parameter.grad = None
    gradients = sum(p.numel() * p.element_size() for p in layer.parameters()) + x_TD.numel() * x_TD.element_size()
    return max(1, peak_bytes(_step(layer, x_TD, grad_TD), device) - gradients)


def _step(layer: Layer, x_TD: Tensor, grad_TD: Tensor) -> Callable[[], None]:
    """Forward and backward, the auxiliary loss included."""
    parameters = list(layer.parameters())

    def step() -> None:
        x_TD.grad = None
        for parameter in parameters:
            parameter.grad = None
        y_TD, aux_loss = layer(x_TD)
        if aux_loss is None:
            y_TD.backward(grad_TD)
        else:
            torch.autograd.backward((y_TD, aux_loss), (grad_TD, torch.ones_like(aux_loss)))

    return step


def _weights(case: Case, gated: bool, dtype: str, spec: Size, device: torch.device) -> Weights:
    return draw_weights(case.num_experts, spec.width, 4 * spec.width, gated, report.DTYPES[dtype], device)


def _input(case: Case, weights: Weights, spec: Size) -> Tensor:
    """Tokens whose load under the router is what the case wants: all are moved along one direction that favours
    expert e by -strength * log(1 + e), the strength found by bisection."""
    generator = torch.Generator().manual_seed(2)
    x_TD = torch.randn(spec.tokens, spec.width, generator=generator)
    if case.load_max_over_mean is not None:
        router_ED = weights.router_ED.cpu()
        favour_E = -torch.log1p(torch.arange(case.num_experts, dtype=torch.float32))
        direction_D = torch.linalg.lstsq(router_ED, favour_E[:, None]).solution[:, 0]
        low, high = 0.0, 16.0
        for _ in range(16):
            middle = (low + high) / 2
            skewed = _load(x_TD + middle * direction_D, router_ED) > case.load_max_over_mean
            low, high = (low, middle) if skewed else (middle, high)
        x_TD = x_TD + low * direction_D
    return x_TD.to(weights.device, weights.dtype).requires_grad_()


def _load(x_TD: Tensor, router_ED: Tensor) -> float:
    """Choices of the fullest expert over the mean."""
    chosen = (x_TD.detach().float() @ router_ED.T).topk(K, dim=-1).indices
    load_E = torch.bincount(chosen.flatten(), minlength=len(router_ED)).float()
    return float(load_E.max() / load_E.mean())


def _asked_for(candidate: Candidate, parsed: argparse.Namespace) -> bool:
    if parsed.only and not any(word in candidate.name for word in parsed.only):
        return False
    return candidate.quick or bool(parsed.only) or report.size_of(parsed) != "quick"


if __name__ == "__main__":
    sys.exit(main())
