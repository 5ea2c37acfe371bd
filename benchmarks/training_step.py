"""What our trainer costs beside a bare PyTorch loop, and a mixture-of-experts step beside a dense one.

Trainer: `parallel.engine.Engine` (DeepSpeed, ZeRO stage 1, one process) on batches from memory. Bare: the very same
model and loss, `clip_grad_norm_`, `torch.optim.AdamW(fused=True)`; in bf16 with float32 masters. Both start from the
same weights, so their losses must agree.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks import report
from benchmarks.timing import paired_times
from configs.run import RunConfig
from slurm.environ import LaunchEnv

COLUMNS = {
    "case": "case",
    "candidate": "candidate",
    "milliseconds": "ms a step",
    "tokens_per_s": "tokens/s",
    "ratio": "speed x bare",
    "spread": "+/-",
    "target": "target",
    "ratio_to_dense": "time x dense",
    "dense_target": "target",
    "loss": "last loss",
}


@dataclass(frozen=True)
class Size:
    num_layers: int
    width: int
    num_experts: int
    vocab_size: int
    sequence_length: int
    batch_tokens: int
    rounds: int


SIZES = {
    "full": Size(8, 512, 8, 32_000, 512, 2048, 7),  # dense: 40M parameters
    "quick": Size(4, 128, 8, 4096, 256, 1024, 7),
    "smoke": Size(2, 32, 4, 512, 32, 64, 2),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = report.make_parser(
        "training_step",
        (__doc__ or "").split("\n\n")[0],
        "OMP_NUM_THREADS=2 python -m benchmarks.training_step --dtypes bf16",
    )
    parser.add_argument("--dtypes", nargs="+", choices=list(report.DTYPES), default=["float32"])
    parser.add_argument("--batch-tokens", type=int, help="tokens a step, in micro-batches of 2,048 tokens at most")
    parsed = parser.parse_args(arguments)
    device = report.set_up(parsed)
    spec = SIZES[report.size_of(parsed)]
    batch_tokens = parsed.batch_tokens or spec.batch_tokens
    result = report.Report("training_step", report.size_of(parsed), report.machine_facts(device, parsed))
    with report.output_kept_clean():
        from parallel import groups  # here, because importing deepspeed prints

        env = LaunchEnv.read({})
        groups.start(env.rank, env.world_size, env.local_rank, env.master_addr, env.master_port, timeout_s=120)
        try:
            for dtype in parsed.dtypes:
                rounds = report.rounds_for(parsed, {report.size_of(parsed): spec.rounds})
                result.rows.extend(_measure(dtype, spec, batch_tokens, rounds, device))
        finally:
            groups.leave()
    result.notes.append(
        f"{spec.num_layers} layers, width {spec.width}, {spec.vocab_size} vocabulary entries; {batch_tokens} tokens a "
        f"step, sequences of {spec.sequence_length}. moe: {spec.num_experts} experts in every layer, top-2, as many "
        "active FLOPs as dense, so its optimizer alone has more to do. last loss: of the trainer and of the bare loop "
        "after as many steps from the same weights."
    )
    result.print(parsed.json, COLUMNS)
    return 0


def _measure(
    dtype: str, spec: Size, batch_tokens: int, rounds: int, device: torch.device
) -> list[dict[str, report.Figure]]:
    from benchmarks.training_loops import BareLoop, Trainer
    from pretrain import budget

    loops: dict[str, Trainer | BareLoop] = {}
    rows: dict[str, dict[str, report.Figure]] = {}
    for kind in ("dense", "moe"):
        config = run_config(spec, dtype, batch_tokens, experts=kind == "moe")
        for candidate, loop_type in (("trainer", Trainer), ("bare loop", BareLoop)):
            name = f"{kind} {candidate}"
            loops[name] = loop_type(config, device)
            rows[name] = {"case": f"{kind} {dtype}", "dtype": dtype, "candidate": candidate}
            rows[name]["parameters"] = budget.parameters(config.model).total
    steps: dict[str, Callable[[], object]] = {name: loop.step for name, loop in loops.items()}
    times = paired_times(steps, rounds, device, limit_s=240.0)
    for name, row in rows.items():
        kind, _, candidate = name.partition(" ")
        row |= {
            "milliseconds": times.median(name) * 1e3,
            "tokens_per_s": batch_tokens / times.median(name),
            "ratio": times.ratio(f"{kind} bare loop", name),
            "spread": times.spread(f"{kind} bare loop", name),
            "loss": loops[name].losses[-1],
        }
        if candidate == "trainer":
            row["target"] = 0.97
        if kind == "moe":
            row |= {"ratio_to_dense": times.ratio(name, f"dense {candidate}"), "dense_target": 1.25}
    return list(rows.values())


def run_config(spec: Size, dtype: str, batch_tokens: int, experts: bool) -> RunConfig:
    """A decoder whose experts together do, top-2, what its dense layers do."""
    micro = max(1, min(batch_tokens, 2048) // spec.sequence_length)
    ffn_width = 2 * spec.width
    model: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "num_layers": spec.num_layers,
        "width": spec.width,
        "attention": {"num_heads": max(1, spec.width // 64), "head_width": min(64, spec.width)},
        "ffn": {"width": ffn_width, "activation": "gelu", "gated": True},
    }
    if experts:
        expert = {"width": ffn_width // 2, "activation": "gelu", "gated": True}
        model["moe"] = {"num_experts": spec.num_experts, "every": 1, "expert": expert}
    tree = {
        "name": "training_step",
        "run_dir": "unused",
        "model": model,
        "data": {"sources": [{"name": "memory", "path": "unused"}]},
        "train": {
            "steps": 1000,
            "sequence_length": spec.sequence_length,
            "batch_tokens": batch_tokens,
            "micro_batch_sequences": micro,
            "optimizer": {"peak_lr": 1e-4},
            "schedule": {"kind": "cosine", "warmup_steps": 0},
            "precision": dtype,
        },
    }
    return RunConfig.check(tree, where="benchmarks/training_step.py")


if __name__ == "__main__":
    sys.exit(main())
