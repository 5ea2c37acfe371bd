"""The training loop."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import torch
from torch import Tensor

from configs.base import fingerprint_of
from configs.errors import EXIT_DONE, EXIT_STOPPED
from configs.run import RunConfig
from parallel.collectives import any_rank
from parallel.engine import StepResult
from pretrain import blocklist, budget
from pretrain.build import Run
from pretrain.checkpoint import Restored
from pretrain.data import cut_batch
from pretrain.evaluate import evaluate_on_ranks
from pretrain.health import BadStep, History, Judge, Verdict
from pretrain.metrics import Metrics
from pretrain.optim import learning_rate
from pretrain.rollback import announcement, roll_back, take_up_blocklist


def train(run: Run) -> int:
    """Train to the last step or until asked to stop; returns the exit code."""
    state, steps, device, health = run.state, run.config.train.steps, run.engine.device, run.config.train.health
    take_up_blocklist(run)
    take_up_history(run)
    announce(run)
    last_step = min(steps, state.step + (run.config.train.stop_after_steps or steps))
    while state.step < last_step:
        began = time.perf_counter()
        lr = learning_rate(state.step, run.config.train)
        judge = Judge(state.history, health, run.config.model.moe, run.engine.router_loads)
        result = run.engine.train_step(next_micro_batches(run), lr, judge)
        seconds = time.perf_counter() - began  # of the step alone: evaluations and saves have records of their own
        count_step(run, result, judge.verdict, seconds)
        if health.max_skips_in_row is not None and len(state.row) >= health.max_skips_in_row:
            go_back(run)
            continue
        if run.metrics:
            run.metrics.advance(state.step)
        if due(state.step, run.config.train.log_every_steps, last_step):
            figures = {"loss": result.cross_entropy, "grad_norm": result.grad_norm, "lr": lr}
            log(run, figures | judge.verdict.figures(), seconds, judge.loads)
        if run.heldout and due(state.step, run.config.train.eval_every_steps, steps):
            evaluate(run)
        stopping = any_rank(bool(run.stop), device) or (state.step == last_step < steps)
        if stopping or due(state.step, run.config.train.save_every_steps, steps):
            run.checkpoints.save(run.engine, state)
        note_saves(run)
        if stopping or state.step == steps:
            run.checkpoints.wait()
            note_saves(run)
        if stopping:
            run.say(f"stopped after step {state.step} of {steps} ({run.stop.name or 'train.stop_after_steps'})")
            return EXIT_STOPPED
    run.say(
        f"done: {state.step} steps, {state.tokens:,} tokens, {len(state.skipped)} step(s) skipped, "
        f"{state.rollbacks} rollback(s)"
    )
    return EXIT_DONE


def count_step(run: Run, result: StepResult, verdict: Verdict, seconds: float) -> None:
    """What a step changes in the state, tensors excepted."""
    state = run.state
    state.step += 1
    run.status.step = state.step  # what is told if it ends here
    state.updates += result.applied
    state.tokens += run.config.train.batch_tokens
    state.seconds += seconds
    state.cursor = run.sampler.cursor
    if result.applied:
        state.row = []
        window_steps = run.config.train.health.window_steps
        state.history.add(result.cross_entropy, result.grad_norm, verdict.router_spread, window_steps)
    else:
        loss, norm = repr(result.cross_entropy), repr(result.grad_norm)
        state.row.append(BadStep(state.step, verdict.reason, loss, norm, run.sampler.ranges(run.sampler.chosen)))
        note_skip(run, state.row[-1], verdict)


def take_up_history(run: Run) -> None:
    """Losses of another mixture or batch say nothing about the next ones: those are judged by their own."""
    identities = {name: source.stream.identity for name, source in run.sampler.sources.items()}
    batch = (run.config.train.batch_tokens, run.config.train.sequence_length)
    regime = fingerprint_of([run.sampler.weights, identities, batch])
    if run.state.history.regime != regime:
        run.state.history = History(regime)


def go_back(run: Run) -> None:
    """Too many unfit steps in a row."""
    run.engine.progress("a rollback")
    run.checkpoints.wait()
    note_saves(run)
    event = roll_back(run)
    take_up_history(run)  # the checkpoint may be from before a change of data
    if run.metrics:
        run.metrics.go_back(run.state.step)
        # The record of a start, as that may have been dropped just now.
        run.metrics.write("event", run.state.step, {**data_record(run), **event})
        run.say(announcement(event))


def due(step: int, every: int, last: int) -> bool:
    return step % every == 0 or step == last


def next_micro_batches(run: Run) -> list[tuple[Tensor, Tensor]]:
    """Draw the next global batch and read this data-parallel rank's slice of it."""
    chosen = run.sampler.next_batch(run.config.train.batch_sequences)
    if not run.engine.reads_data:
        return []
    topology = run.engine.topology
    size = len(chosen) // topology.data
    windows = run.sampler.read(chosen[topology.data_rank * size : (topology.data_rank + 1) * size])
    parts = cut_batch(windows, run.config.train.micro_batch_sequences)
    return [(torch.from_numpy(tokens), torch.from_numpy(labels)) for tokens, labels in parts]


def announce(run: Run) -> None:
    """What is about to be trained, and from where."""
    p = budget.parameters(run.config.model)
    ranks = run.engine.topology.world_size
    run.say(
        f"{run.config.name}: {p.total:,} parameters, {p.active:,} active per token; "
        f"{ranks} rank(s): {run.config.parallel.in_words(ranks)}; "
        f"{run.config.train.precision} on {run.engine.device}"
    )
    if run.restored and run.metrics:
        note_restored(run, run.restored, run.metrics)
    if run.started_from:
        run.say(f"begins with the weights of {run.started_from}")
    if run.metrics:
        if blocked := sum(one.count for one in run.state.blocklist):
            run.say(f"passes over {blocked} sample(s) of its blocklist")
        times = {"seconds": run.start_seconds, "step_seconds": run.state.seconds}
        figures = {"event": "started", **times, **data_record(run)}
        run.metrics.write("event", run.state.step, figures)


def note_restored(run: Run, restored: Restored, metrics: Metrics) -> None:
    for folder, faults in restored.damaged.items():
        run.say(f"{folder} is damaged, and is passed over and renamed: {'; '.join(faults[:3])}")
        metrics.write("event", run.state.step, {"event": "damaged", "checkpoint": str(folder), "faults": faults[:20]})
    figures = {"bytes": restored.bytes, "verify_s": restored.verify_s, "load_s": restored.load_s}
    metrics.write("event", run.state.step, {"event": "resumed", "checkpoint": str(restored.folder), **figures})
    run.say(
        f"resumed from {restored.folder} (step {run.state.step}): verified in {restored.verify_s:.1f} s, "
        f"loaded in {restored.load_s:.1f} s"
    )


def data_record(run: Run) -> dict[str, Any]:
    """What `glam prep explain` needs to find a step's documents again, whatever the configuration is by then."""
    t = run.engine.topology
    return {
        "cursor": dataclasses.asdict(run.sampler.cursor),
        "blocklist": blocklist.to_json(run.sampler.blocklist),
        "data": run.config.data.model_dump(mode="json"),
        "datasets": {name: source.stream.identity for name, source in run.sampler.sources.items()},
        "sequence_length": run.config.train.sequence_length,
        "batch_tokens": run.config.train.batch_tokens,
        "layout": {"data": t.data, "context": t.context, "tensor": t.tensor, "pipeline": t.pipeline},
    }


def note_skip(run: Run, bad: BadStep, verdict: Verdict) -> None:
    run.state.skipped.append(bad.step)
    if run.metrics:
        figures = {"reason": bad.reason, "loss": bad.loss, "grad_norm": bad.grad_norm, **verdict.figures()}
        run.metrics.write("event", bad.step, {"event": "skipped", **figures})
        shown = "".join(f", {name} {value:.3g}" for name, value in verdict.figures().items())
        run.say(
            f"step {bad.step} skipped, {bad.reason}: loss {bad.loss}, gradient norm {bad.grad_norm}{shown}; "
            "weights unchanged"
        )


def log(run: Run, figures: dict[str, float], step_seconds: float, loads: dict[int, Tensor] | None) -> None:
    """One record and one line; router figures are of this step alone.

    Args:
        loads: of the routers, if they were asked for already.
    """
    loads = run.engine.router_loads() if loads is None else loads  # all ranks take part
    if run.metrics is None:
        return
    per_second = run.config.train.batch_tokens / step_seconds
    flops = budget.flops_per_token(run.config.model, run.config.train.sequence_length)
    tflops = per_second * flops / run.engine.topology.world_size / 1e12
    figures = figures | {
        "tokens": run.state.tokens,
        "tokens_per_s": per_second,
        "tflops_per_s_per_rank": tflops,
        "step_seconds": run.state.seconds,  # of all steps so far
        "skipped_steps": len(run.state.skipped),
        **{f"epoch/{name}": value for name, value in run.sampler.epochs().items()},
        **router_figures(loads, run.config),
    }
    run.metrics.write("train", run.state.step, {**figures, "cursor": dataclasses.asdict(run.sampler.cursor)})
    left = (run.config.train.steps - run.state.step) * run.state.seconds / run.state.step
    worst = max((v for k, v in figures.items() if k.endswith("/max_over_mean")), default=None)
    shown = f"loss {figures['loss']:.4f}  norm {figures['grad_norm']:.2f}  lr {figures['lr']:.2e}"
    shown += f"  {per_second:,.0f} tokens/s"
    shown += f"  load {worst:.2f}" if worst else ""
    run.metrics.show(run.state.step, shown + f"  {left / 60:.1f} min left")


def router_figures(loads: dict[int, Tensor], config: RunConfig) -> dict[str, float]:
    """Per layer: load of the fullest expert over the mean, entropy of the load over ln E, share of dropped choices,
    balance and z losses without coefficients."""
    figures: dict[str, float] = {}
    for layer, totals in loads.items():
        assert config.model.moe is not None
        load_E, (choices, balance, z, passes) = totals[:-4], totals[-4:].tolist()
        share_E = load_E / load_E.sum()
        entropy = float(torch.special.entr(share_E).sum()) / max(1e-12, float(torch.tensor(len(load_E)).log()))
        prefix = f"layer_{layer:02d}"
        figures[f"{prefix}/max_over_mean"] = float(load_E.max() / load_E.mean())
        figures[f"{prefix}/load_entropy"] = entropy
        if config.model.moe.router.kind != "expert_choice":
            figures[f"{prefix}/dropped"] = 1 - float(load_E.sum()) / choices
        figures[f"{prefix}/balance_loss"] = balance / passes
        figures[f"{prefix}/z_loss"] = z / passes
    return figures


def evaluate(run: Run) -> None:
    assert run.heldout is not None
    began = time.perf_counter()
    found = evaluate_on_ranks(run.engine, run.heldout, run.heldout_bytes, run.config.train.micro_batch_sequences)
    if run.metrics:
        bits = {"bits_per_byte": found.bits_per_byte} if found.bits_per_byte is not None else {}
        figures = {"loss": found.loss, "tokens": found.tokens, **bits, "seconds": time.perf_counter() - began}
        run.metrics.write("eval", run.state.step, figures)
        shown = "".join(f", {value:.4f} bits per byte" for value in bits.values())
        run.say(f"step {run.state.step}  held-out loss {found.loss:.4f} nats a token{shown} ({found.tokens:,} tokens)")


def note_saves(run: Run) -> None:
    """Checkpoints that were committed since the step before."""
    for saved in run.checkpoints.poll():
        assert run.metrics is not None  # rank 0 alone is told
        rate = saved.bytes / saved.seconds
        figures = {
            "bytes": saved.bytes,
            "seconds": saved.seconds,
            "bytes_per_s": rate,
            "stall_s": saved.stall_s,
            "copied_bytes": saved.copied_bytes,
        }
        run.metrics.write("event", saved.step, {"event": "saved", "checkpoint": str(saved.folder), **figures})
        beside = f", training stood still for {saved.stall_s:.2f} s" if saved.copied_bytes else ""
        run.say(
            f"step {saved.step}  saved {saved.folder}: {saved.bytes / 1e6:,.0f} MB in {saved.seconds:.1f} s "
            f"({rate / 1e6:,.0f} MB/s){beside}"
        )
