"""How much faster is block-sparse attention than full attention: forward and backward of one layer's attention, time
and peak memory, beside causal SDPA (on a GPU cuDNN's), FlexAttention's own causal mask and the dense mask.

S tokens, H heads, N head width, b tokens a block.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import report
from benchmarks.timing import in_fresh_process, paired_times, peak_bytes
from configs.attention import BigBirdLayout, Kernel, SparseConfig
from model.sparse_attention import SparseAttention

MODULE = "benchmarks.attention"
BASE = "SDPA, causal"
COLUMNS = {
    "case": "case",
    "candidate": "candidate",
    "milliseconds": "ms",
    "ratio": "x SDPA",
    "spread": "+/-",
    "ideal": "ideal",
    "target": "target",
    "growth": "x half the length",
    "peak_mb": "peak MB",
    "memory_ratio": "MB x SDPA",
    "difference": "difference",
    "note": "note",
}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Size:
    lengths: tuple[int, ...]
    heads: int
    head_width: int
    block_size: int
    dense_up_to: int  # tokens; a dense mask is length x length
    dtypes: tuple[str, ...]
    rounds: int


CPU_SIZES = {
    "full": Size((2048, 4096, 8192, 16384, 32768), 4, 64, 64, 8192, ("float32", "bf16"), 7),
    "quick": Size((1024, 4096), 2, 64, 64, 1024, ("float32",), 3),
    "smoke": Size((256,), 2, 16, 16, 256, ("float32",), 2),
}
GPU_SIZES = {
    "full": Size((2048, 8192, 32768, 131072), 16, 128, 128, 8192, ("bf16",), 11),
    "quick": Size((8192, 32768), 16, 128, 128, 8192, ("bf16",), 5),
    "smoke": Size((1024,), 2, 64, 128, 1024, ("bf16",), 2),
}
# Wanted of the best kernel, x SDPA: (device, dtype, length).
TARGETS = {
    ("cpu", "float32", 4096): 0.30,
    ("cpu", "float32", 8192): 0.15,
    ("cpu", "float32", 16384): 0.08,
    ("cpu", "float32", 32768): 0.045,
    ("cpu", "bf16", 4096): 0.17,
    ("cpu", "bf16", 8192): 0.10,
    ("cpu", "bf16", 16384): 0.045,
    ("cpu", "bf16", 32768): 0.03,
    ("cuda", "bf16", 8192): 0.5,
    ("cuda", "bf16", 32768): 0.12,
    ("cuda", "bf16", 131072): 0.03,
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = report.make_parser(
        "attention", (__doc__ or "").split("\n\n")[0], "OMP_NUM_THREADS=2 python -m benchmarks.attention --lengths 8192"
    )
    parser.add_argument("--lengths", nargs="+", type=int, metavar="TOKENS")
    parser.add_argument("--dtypes", nargs="+", choices=list(report.DTYPES))
    parser.add_argument("--head-width", type=int, help="N (default: 64 on CPU, 128 on a GPU)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only candidates whose name holds one of these words")
    parser.add_argument("--no-memory", action="store_true", help="times only")
    parser.add_argument("--memory-of", nargs=3, metavar=("CANDIDATE", "LENGTH", "DTYPE"), help=argparse.SUPPRESS)
    parsed = parser.parse_args(arguments)
    device = report.set_up(parsed)
    spec = (GPU_SIZES if device.type == "cuda" else CPU_SIZES)[report.size_of(parsed)]
    if parsed.memory_of:
        name, length, dtype = parsed.memory_of
        with report.output_kept_clean():
            found = _measure_memory(name, int(length), dtype, spec, parsed, device)
        print(found)
        return 0
    result = report.Report("attention", report.size_of(parsed), report.machine_facts(device, parsed))
    with report.output_kept_clean():
        for dtype in report.chosen(parsed.dtypes, spec.dtypes):
            before: dict[str, float] = {}
            for length in parsed.lengths or spec.lengths:
                rows = _measure(length, dtype, spec, parsed, device)
                for row in rows:
                    name, milliseconds = str(row["candidate"]), row.get("milliseconds")
                    if isinstance(milliseconds, float):
                        if name in before and not parsed.lengths:
                            row["growth"] = milliseconds / before[name]
                        before[name] = milliseconds
                result.rows.extend(rows)
    result.notes.extend(
        (
            f"{spec.heads} heads of {parsed.head_width or spec.head_width}, blocks of {spec.block_size}: 1 sink, "
            "window 3, 3 random a head; forward + backward. ideal: share of full causal attention's blocks.",
            "peak MB: held at the fullest beyond queries, keys, values and the gradient of the output. difference: of "
            "output or gradients from the dense mask's, the largest, by norm.",
        )
    )
    result.print(parsed.json, COLUMNS)
    return 0


def candidates(length: int, spec: Size, device: torch.device) -> dict[str, Attend]:
    """Name -> attention over [1, H, S, N] tensors."""
    found: dict[str, Attend] = {BASE: _sdpa_on(SDPBackend.CUDNN_ATTENTION) if device.type == "cuda" else _sdpa}
    kernels: dict[str, Kernel]
    if device.type == "cuda":
        found["FlashAttention-2, causal"] = _sdpa_on(SDPBackend.FLASH_ATTENTION)
        found["FlexAttention, causal"] = _flex_causal(length, device)
        kernels = {"ours, flex": "flex"}
    else:
        kernels = {"ours, gathered": "gathered", "ours, chunked": "chunked"}
    if length <= spec.dense_up_to:
        kernels["dense mask"] = "dense"
    for name, kernel in kernels.items():
        found[name] = SparseAttention(
            SparseConfig(block_size=spec.block_size, layout=BigBirdLayout(), kernel=kernel), 0, spec.heads
        )
    return found


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _sdpa_on(backend: SDPBackend) -> Attend:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return _sdpa(q, k, v)

    return attend


def _flex_causal(length: int, device: torch.device) -> Attend:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    kernel = torch.compile(flex_attention, dynamic=False)
    mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, length, length, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        y: Tensor = kernel(q, k, v, block_mask=mask)
        return y

    return attend


def _inputs(length: int, dtype: str, spec: Size, parsed: argparse.Namespace, device: torch.device) -> list[Tensor]:
    """Queries, keys, values and the gradient of the output."""
    generator = torch.Generator().manual_seed(length)
    shape = (1, spec.heads, length, parsed.head_width or spec.head_width)
    drawn = [torch.randn(shape, generator=generator).to(device, report.DTYPES[dtype]) for _ in range(4)]
    return [x.requires_grad_() for x in drawn[:3]] + drawn[3:]


def _step(attend: Attend, inputs: list[Tensor]) -> Callable[[], list[Tensor]]:
    """Forward and backward; returns output and gradients."""
    q, k, v, grad = inputs

    def step() -> list[Tensor]:
        y = attend(q, k, v)
        return [y.detach(), *torch.autograd.grad(y, (q, k, v), grad)]

    return step


def _measure(
    length: int, dtype: str, spec: Size, parsed: argparse.Namespace, device: torch.device
) -> list[dict[str, report.Figure]]:
    inputs = _inputs(length, dtype, spec, parsed, device)
    found = {n: a for n, a in candidates(length, spec, device).items() if n == BASE or _asked_for(n, parsed)}
    rows = {name: {"case": f"{length} {dtype}", "candidate": name, "dtype": dtype} for name in found}
    steps: dict[str, Callable[[], object]] = {}
    outputs: dict[str, list[Tensor]] = {}
    for name, attend in found.items():
        try:
            step = _step(attend, inputs)
            first = step()
        except Exception as error:  # what cannot run here must not end the comparison of the others
            rows[name]["note"] = f"did not run: {type(error).__name__}: {str(error)[:80]}"
            continue
        steps[name] = step
        if name == "dense mask" or name.startswith("ours"):
            outputs[name] = first if length <= spec.dense_up_to else []
        if isinstance(attend, SparseAttention):
            rows[name]["ideal"] = attend.layout(length).density()
            if name != "dense mask":
                rows[name]["target"] = TARGETS.get((device.type, dtype, length))
    for name, values in outputs.items():
        if "dense mask" in outputs and values and name != "dense mask":
            rows[name]["difference"] = max(map(_difference, values, outputs["dense mask"]))
    outputs.clear()
    times = paired_times(steps, report.rounds_for(parsed, {report.size_of(parsed): spec.rounds}), device, 1, 90.0)
    memory = {} if parsed.no_memory else _memory(list(steps), length, dtype, spec, parsed, device)
    for name in steps:
        rows[name]["milliseconds"] = times.median(name) * 1e3
        if BASE in steps:
            rows[name] |= {"ratio": times.ratio(name, BASE), "spread": times.spread(name, BASE)}
        if name in memory:
            rows[name]["peak_mb"] = report.megabytes(memory[name])
            if BASE in memory:
                rows[name]["memory_ratio"] = memory[name] / memory[BASE]
    return list(rows.values())


def _difference(value: Tensor, wanted: Tensor) -> float:
    wanted = wanted.float()
    return float((value.float() - wanted).norm() / wanted.norm())


def _memory(
    names: list[str], length: int, dtype: str, spec: Size, parsed: argparse.Namespace, device: torch.device
) -> dict[str, int]:
    if device.type == "cuda":
        return {name: _measure_memory(name, length, dtype, spec, parsed, device) for name in names}
    width = ["--head-width", str(parsed.head_width)] if parsed.head_width else []
    arguments = [*report.repeated(parsed), *width, "--memory-of"]
    return {name: int(in_fresh_process(MODULE, [*arguments, name, str(length), dtype])) for name in names}


def _measure_memory(
    name: str, length: int, dtype: str, spec: Size, parsed: argparse.Namespace, device: torch.device
) -> int:
    """Bytes beyond the inputs of one step."""
    inputs, attend = _inputs(length, dtype, spec, parsed, device), candidates(length, spec, device)[name]
    if device.type == "cuda":
        _step(attend, inputs)()  # compiled kernels
    else:
        _step(attend, [x[:, :, : 2 * spec.block_size].detach().requires_grad_() for x in inputs])()
    if isinstance(attend, SparseAttention):
        attend.layout(length)  # made once a run
    return max(1, peak_bytes(_step(attend, inputs), device))


def _asked_for(name: str, parsed: argparse.Namespace) -> bool:
    return not parsed.only or any(word in name for word in parsed.only)


if __name__ == "__main__":
    sys.exit(main())
