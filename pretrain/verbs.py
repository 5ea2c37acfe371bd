"""What each `glam` verb does. Heavy libraries are imported by the verb that needs them."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from configs.errors import UserError
from configs.run import RunConfig
from pretrain import budget

if TYPE_CHECKING:
    from model.glam import GLaM


def plan(args: Any) -> None:
    config = RunConfig.load(args.config, args.overrides)
    if args.attention:
        return _plan_attention(config, args.json)
    p = config.parallel
    ranks = p.data * p.model_ranks if p.data != "auto" else (args.ranks or p.fewest_ranks)
    counts = budget.parameters(config.model)
    memory = budget.bytes_per_rank(config, ranks)
    flops = budget.flops_per_token(config.model, config.train.sequence_length)
    training_tokens = config.train.steps * config.train.batch_tokens
    cut, saved = budget.stages(config), budget.checkpoint_bytes(config.model)
    stage_layers = [len(cut.blocks(stage)) for stage in range(p.pipeline)]
    if args.json:
        parts = {k: v for k, v in vars(counts).items()}
        print(json.dumps({
            "name": config.name, "total_params": counts.total, "active_params": counts.active, "params": parts,
            "flops_per_token": flops, "ranks": ranks, "bytes_per_rank": memory.total, "bytes": vars(memory),
            "checkpoint_bytes": saved, "stage_layers": stage_layers, "training_tokens": training_tokens,
            "training_flops": flops * training_tokens,
        }))  # fmt: skip
        return
    table = Table(title=f"{config.name}: {config.model.num_layers} layers, width {config.model.width}")
    table.add_column("what")
    table.add_column("how much", justify="right")
    for name, value in vars(counts).items():
        table.add_row(f"parameters: {name.replace('_', ' ')}", f"{value:,}")
    table.add_row("total parameters", f"[bold]{counts.total:,}[/]")
    table.add_row("active parameters per token", f"[bold]{counts.active:,}[/]")
    table.add_section()
    table.add_row("training FLOPs per token", f"{flops:.4g}")
    table.add_row("training tokens", f"{training_tokens:,}")
    table.add_row("training FLOPs", f"{flops * training_tokens:.4g}")
    table.add_section()
    table.add_row("ranks", f"{ranks:,} ({p.in_words(ranks)})")
    if p.pipeline > 1:
        table.add_row("layers of each stage", " ".join(str(count) for count in stage_layers))
    for name, value in vars(memory).items():
        table.add_row(f"GiB per rank: {name}", f"{value / 2**30:,.2f}")
    table.add_row("GiB per rank", f"[bold]{memory.total / 2**30:,.2f}[/]")
    table.add_section()
    table.add_row("GiB of a checkpoint", f"{saved / 2**30:,.2f}")
    if config.train.async_save:
        copy = memory.optimizer if p.zero_stage == 1 else saved / ranks  # replicas are written, and copied, once
        table.add_row("GiB of main memory per rank meanwhile", f"{copy / 2**30:,.2f}")
    Console().print(table)


def _plan_attention(config: RunConfig, as_json: bool) -> None:
    from pretrain.attention_plan import draw, plan_attention, print_plan

    found, picture = plan_attention(config), Path(config.run_dir) / "attention.png"
    draw(config, found, picture)
    if as_json:
        print(json.dumps(found.as_json() | {"picture": str(picture)}))
    else:
        print_plan(found, picture)


def train(args: Any) -> int:
    from pretrain.main import main

    return main(["--config", args.config, *args.overrides])


def eval(args: Any) -> None:
    config, folder, model = _load_run(Path(args.run))

    from pretrain.build import make_heldout
    from pretrain.data import Sampler, unigram_nats
    from pretrain.evaluate import evaluate_alone

    heldout = make_heldout(config)
    if heldout is None:
        raise UserError(f"{args.run} has no held-out data", "data.heldout in its configuration", "name a folder there")
    text_bytes = heldout.text_bytes()
    found = evaluate_alone(model, heldout, text_bytes, config.train.micro_batch_sequences)
    sampler = Sampler(config.data, config.train.sequence_length)
    baseline = unigram_nats(sampler, heldout, config.model.vocab_size)
    bits = baseline * found.tokens / math.log(2) / text_bytes if text_bytes else None
    if args.json:
        print(json.dumps({
            "checkpoint": str(folder), "tokens": found.tokens, "loss": found.loss, "bits_per_byte": found.bits_per_byte,
            "order0_loss": baseline, "order0_bits_per_byte": bits, "loss_by_quarter": found.quarters,
        }))  # fmt: skip
        return
    table = Table(title=f"{folder}: {found.tokens:,} held-out tokens")
    for column in ("", "nats per token", "bits per byte"):
        table.add_column(column, justify="right" if column else "left")
    last = ("model, last quarter of the positions", found.quarters[-1], None)
    rows = (("model", found.loss, found.bits_per_byte), last, ("order-0 baseline", baseline, bits))
    for name, nats, per_byte in rows:
        table.add_row(name, f"{nats:.4f}", f"{per_byte:.4f}" if per_byte is not None else "-")
    Console().print(table)


def generate(args: Any) -> None:
    if args.temperature < 0 or not 0 <= args.top_p <= 1:
        raise UserError(
            f"temperature {args.temperature}, top-p {args.top_p}",
            "a temperature of at least 0 and a top-p between 0 and 1",
            "0.8 and 0.95 are the defaults",
        )
    if not args.prompt:
        raise UserError("an empty prompt", "at least one token to continue", "pass some text to --prompt")
    config, _, model = _load_run(Path(args.run))

    import numpy as np

    from data_prep.format import TokenStream
    from data_prep.tokenizer import Tokenizer
    from pretrain.generate import generate as continue_text

    stream = TokenStream(config.data.sources[0].path)
    if stream.manifest is None:
        raise UserError(
            f"{stream.folder} does not say which tokenizer made it", "shards made by `glam prep`", "prepare them"
        )
    tokenizer = Tokenizer(stream.folder / stream.manifest.tokenizer)
    prompt = tokenizer.encode(args.prompt).tolist()
    if not prompt:  # a foreign tokenizer may drop what was given
        raise UserError(
            f"a prompt without tokens: {args.prompt!r}", "at least one token", "pass other text to --prompt"
        )
    if len(prompt) + args.max_tokens > (longest := config.train.sequence_length):
        raise UserError(
            f"a prompt of {len(prompt)} tokens and --max-tokens {args.max_tokens}",
            f"{longest} together: train.sequence_length, the most the model has seen",
            "ask for fewer, or train it on longer sequences first (docs/long_context.md)",
        )
    sys.stdout.write(args.prompt)
    ids: list[int] = []
    shown = len(tokenizer.decode(np.array(prompt)))
    for token in continue_text(
        model, prompt, args.max_tokens, args.temperature, args.top_p, tokenizer.eos_id, args.seed
    ):
        ids.append(token)
        text = tokenizer.decode(np.array(prompt + ids))
        if not text.endswith("\ufffd"):  # a character of several bytes is not whole yet
            sys.stdout.write(text[shown:])
            sys.stdout.flush()
            shown = len(text)
    print()


def parity(args: Any) -> int:
    config = RunConfig.load(args.config, args.overrides)
    if args.micro_batches < 1 or args.steps < 1:
        raise UserError(
            f"--micro-batches {args.micro_batches} --steps {args.steps}", "at least 1 of each", "leave them out"
        )
    with contextlib.redirect_stdout(sys.stderr):  # deepspeed binds its log to stdout otherwise, into --json
        from pretrain.gate import run_gate

    return run_gate(config, args)


def report(args: Any) -> None:
    run = Path(args.run)
    if not (run / "metrics.jsonl").exists():
        raise UserError(f"{run} has no metrics.jsonl", "the folder of a run that has started", "check the path")

    from pretrain.report import plot_run

    print(plot_run(run))


def _load_run(run_dir: Path) -> tuple[RunConfig, Path, GLaM]:
    """A run's configuration, its newest checkpoint, and the whole model filled from it, on this process."""
    if not (run_dir / "config.yaml").exists():
        raise UserError(f"{run_dir} has no config.yaml", "the folder of a run", "check the path")

    with contextlib.redirect_stdout(sys.stderr):  # deepspeed binds its log to stdout otherwise, into --json
        import torch

        from model.glam import GLaM
        from pretrain.checkpoint import load_weights
        from pretrain.checkpoint_folders import complete_checkpoints
        from pretrain.generate import without_capacity

    config = RunConfig.load(run_dir / "config.yaml")
    found = complete_checkpoints(run_dir)
    if not found:
        raise UserError(f"{run_dir} holds no complete checkpoint", "at least one", "train until the first save")
    with torch.device("meta"):
        model = GLaM(without_capacity(config.model))
    model.to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    load_weights(found[-1], model, config.model)
    return config, found[-1], model
