"""Arguments of pretrain/main.py and of `glam`. The only file that parses any."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence

from configs.site import LAUNCHERS

OVERRIDES_HELP = "changes to the file, as section.key=value (YAML values), e.g. train.steps=100 model.moe=null"
JSON_HELP = "one JSON object on standard output"
PREP_STAGES = ("read", "clean", "dedup", "quality", "tokenizer", "tokenize")
MakeVerb = Callable[[str, str, str], argparse.ArgumentParser]  # name, summary, example
PREP_VIEWS = ("verify", "explain", "stats", "quality")
CHECKPOINT_VIEWS = ("verify", "show", "diff", "average", "convert", "export", "import", "upcycle")
_VIEWS = {"prep": PREP_VIEWS, "checkpoint": CHECKPOINT_VIEWS}
STORED_TYPES = ("float32", "bfloat16", "float16")
CHECKPOINT_HELP = "a checkpoint folder, or a run folder, of which the newest checkpoint is meant"


def train_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of pretrain/main.py."""
    parser = argparse.ArgumentParser(
        prog="pretrain/main.py",
        description="Train a model; a run folder that holds a checkpoint goes on from it.",
        epilog="example: deepspeed --num_accelerators 2 pretrain/main.py --config configs/demo.yaml train.steps=200",
    )
    parser.add_argument("--config", required=True, help="a run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher adds it
    return parser.parse_args(arguments)


def glam_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Arguments of `glam`. Verbs of two words ("prep verify") are one to the parser."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if len(given) > 1 and given[1] in _VIEWS.get(given[0], ()):
        given[:2] = [" ".join(given[:2])]
    parser = glam_parser()
    parsed, rest = parser.parse_known_args(given)
    if hasattr(parsed, "incomplete"):
        _say_views(parsed.incomplete, parsed.view)
    # argparse takes positionals in one run only; a change to the file may stand behind an option.
    if rest and not (hasattr(parsed, "overrides") and all(re.match(r"[A-Za-z_][\w.]*=", item) for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        parsed.overrides += rest
    return parsed


def glam_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="glam", description="Pretrain GLaM-like sparse language models.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        return verbs.add_parser(name, help=summary, description=summary, epilog=f"example: {example}")

    def configured(name: str, summary: str, example: str) -> argparse.ArgumentParser:
        made = verb(name, summary, example)
        made.add_argument("config")
        made.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
        return made

    plan = configured(
        "plan",
        "Parameters, FLOPs and bytes per rank of a configuration, without devices.",
        "glam plan configs/glam.yaml --json",
    )
    plan.add_argument("--ranks", type=int, help="ranks where parallel.data is auto (default: the fewest that carry it)")
    plan.add_argument("--json", action="store_true", help=JSON_HELP)
    plan.add_argument(
        "--attention",
        action="store_true",
        help="what block-sparse attention sees instead: density, reach in layers, and a picture in the run's folder",
    )

    _prep(
        configured(
            "prep",
            "Make a tokenizer and token shards from raw text; goes on from what an earlier call did. Under mpiexec or "
            "srun --mpi=pmi2 the ranks share the work. See also: glam prep verify | explain | stats | quality.",
            "glam prep configs/corpus_demo.yaml --workers 4",
        )
    )
    _prep_views(verb)
    configured(
        "train",
        "Train on this process alone (several ranks: start pretrain/main.py with a launcher).",
        "glam train configs/demo.yaml parallel.expert=1",
    )
    _parity(
        configured(
            "parity",
            "Prove that layouts train as one process does: losses, every gradient, the norm, weights. Exit code 1 if "
            "one does not. Under a launcher it uses the launched ranks, else it starts its own here.",
            "glam parity configs/demo.yaml --layout tp=2,pp=2,ep=2,dp=2 --layout dp=2,zero=0",
        )
    )
    _on_cluster(configured)
    _life(verb)
    _run_views(verb)
    _checkpoint_views(verb)
    return parser


def _on_cluster(configured: MakeVerb) -> None:
    configured(
        "preflight",
        "Ask the machines whether they can carry a run: memory, disks, data, clocks, speeds. Exit code 1 if one says "
        "no. Under a launcher it asks the launched ranks, else it starts a few here.",
        "glam preflight configs/demo.yaml --json",
    ).add_argument("--json", action="store_true", help=JSON_HELP)
    _submit(
        configured(
            "submit",
            "Queue a run on a SLURM cluster: code and configuration are copied beside the run, and it is queued again "
            "until it is done. A run folder that holds a checkpoint is gone on from.",
            "glam submit configs/glam_1.7b_64e.yaml --cluster slurm/clusters/example.yaml --nodes 16 --dry-run",
        )
    )


def _submit(submit: argparse.ArgumentParser) -> None:
    submit.add_argument("--cluster", required=True, metavar="FILE", help="the cluster's YAML file (slurm/clusters/)")
    submit.add_argument("--nodes", type=int, metavar="N", help="(default: what the layout takes; with --prep 1)")
    submit.add_argument("--dry-run", action="store_true", help="print the script; write and queue nothing")
    submit.add_argument("--launcher", choices=LAUNCHERS, help="what starts the ranks (default: the cluster's file's)")
    submit.add_argument(
        "--prep", action="store_true", help="CONFIG is a corpus: run `glam prep` on MPI ranks over the nodes"
    )


def _life(verb: MakeVerb) -> None:
    status = verb(
        "status",
        "How a run fares: its job, step, newest checkpoint, starts, failures, decisions to requeue, goodput.",
        "glam status runs/demo --json",
    )
    status.add_argument("run", help="a run folder")
    status.add_argument("--json", action="store_true", help=JSON_HELP)
    stop = verb(
        "stop",
        "Let a run save and end, and not come back: writes RUN/STOP, signals its job. `glam submit` goes on with it.",
        "glam stop runs/demo",
    )
    stop.add_argument("run", help="a run folder")


def _run_views(verb: MakeVerb) -> None:
    evaluate = verb(
        "eval",
        "Held-out loss and bits per byte of a run's newest checkpoint, beside an order-0 baseline.",
        "glam eval runs/demo",
    )
    evaluate.add_argument("run", help="a run folder")
    evaluate.add_argument("--json", action="store_true", help=JSON_HELP)
    _generate(
        verb(
            "generate",
            "Continue a text with a run's newest checkpoint.",
            "glam generate runs/demo --prompt 'def main():' --max-tokens 100",
        )
    )
    verb("report", "Draw a run's curves into RUN/loss.png.", "glam report runs/demo").add_argument(
        "run", help="a run folder"
    )


def _prep(prep: argparse.ArgumentParser) -> None:
    prep.add_argument("--stage", choices=PREP_STAGES, help="stop behind this stage; a later call goes on")
    prep.add_argument("--workers", type=int, help="processes (default: the configuration's; under MPI its ranks)")
    prep.add_argument(
        "--redo", action="store_true", help="remake what a changed configuration or changed sources touch"
    )


def _prep_views(verb: MakeVerb) -> None:
    verify = verb(
        "prep verify",
        "Check every byte, index and token id of a corpus or dataset; names the shard and place that is wrong.",
        "glam prep verify data/demo",
    )
    verify.add_argument("folder", help="a corpus, one of its datasets, or a pair made by Megatron")
    verify.add_argument("--workers", type=int, choices=range(1, 257), default=2, metavar="N", help="1 to 256")
    verify.add_argument("--json", action="store_true", help=JSON_HELP)
    explain = verb(
        "prep explain",
        "The documents a training step saw: source file, position, first line.",
        "glam prep explain runs/demo --step 120 --rank 0",
    )
    explain.add_argument("run", help="a run folder")
    explain.add_argument("--step", type=int, required=True, help="counted from 1, as in the log")
    explain.add_argument("--rank", type=int, help="only what this rank read")
    explain.add_argument("--json", action="store_true", help=JSON_HELP)
    stats = verb(
        "prep stats",
        "Tables and pictures of a corpus: lengths, tokens, bytes per token, what was left out and why.",
        "glam prep stats data/demo",
    )
    stats.add_argument("folder", help="a corpus")
    stats.add_argument("--out", help="where the PNG goes (default: stats.png beside the corpus: CORPUS.stats.png)")
    stats.add_argument("--json", action="store_true", help=JSON_HELP)
    quality = verb(
        "prep quality",
        "What a quality classifier has learned; with --text, the score of a file.",
        "glam prep quality data/web/quality/classifier.safetensors --text page.txt",
    )
    quality.add_argument("classifier", help="a classifier.safetensors")
    quality.add_argument("--text", help="a text file to score")


def _parity(parity: argparse.ArgumentParser) -> None:
    parity.add_argument(
        "--layout",
        action="append",
        default=[],
        help="degrees tp, cp, pp, ep, dp; switches sp, etp, zero, recompute = 0 or 1; schedule=dualpipev; "
        "mb=micro-batches (default: the configuration's, each degree at most 2)",
    )
    parity.add_argument("--micro-batches", type=int, default=4, help="a step, where a layout does not say (default 4)")
    parity.add_argument("--steps", type=int, default=3)
    parity.add_argument("--full-size", action="store_true", help="keep the model's sizes, not its kinds only")
    parity.add_argument("--tolerance", type=float, help="relative (default 1e-5, on GPUs 1e-4)")
    parity.add_argument("--json", action="store_true", help=JSON_HELP)


def _generate(generate: argparse.ArgumentParser) -> None:
    generate.add_argument("run", help="a run folder")
    generate.add_argument("--prompt", required=True)
    generate.add_argument("--max-tokens", type=int, default=120)
    generate.add_argument("--temperature", type=float, default=0.8, help="0 takes the most probable token")
    generate.add_argument("--top-p", type=float, default=0.95)
    generate.add_argument("--seed", type=int, default=0)


def _checkpoint_views(verb: MakeVerb) -> None:
    plain = verb(
        "checkpoint",
        f"Checkpoints: glam checkpoint {' | '.join(CHECKPOINT_VIEWS)}; each has --help.",
        "glam checkpoint verify runs/demo",
    )
    plain.add_argument("view", nargs="?", metavar="VIEW", help=f"one of {', '.join(CHECKPOINT_VIEWS)}")
    plain.set_defaults(incomplete=plain)
    _checkpoint_looks(verb)
    _checkpoint_makers(verb)
    _checkpoint_borders(verb)


def _say_views(plain: argparse.ArgumentParser, view: str | None) -> None:
    """Help, and exit code 2: a verb of two words of which the second is missing or unknown."""
    plain.print_help(sys.stderr)
    near = difflib.get_close_matches(view or "", CHECKPOINT_VIEWS, n=1)
    hint = f": did you mean {near[0]!r}?" if near else ""
    plain.exit(2, f"\n{plain.prog}: " + (f"unknown view {view!r}{hint}\n" if view else "a view is missing\n"))


def _checkpoint_looks(verb: MakeVerb) -> None:
    verify = verb(
        "checkpoint verify",
        "Check every byte of every file against its checksum; names file, tensor and bytes that are wrong. A run "
        "folder means all its checkpoints. Exit code 1 if anything is damaged.",
        "glam checkpoint verify runs/demo --threads 8",
    )
    verify.add_argument("path", help="a checkpoint folder, or a run folder, of which all checkpoints are meant")
    verify.add_argument("--threads", type=int, choices=range(1, 257), metavar="N", help="1 to 256 (default: by CPUs)")
    verify.add_argument("--json", action="store_true", help=JSON_HELP)
    show = verb(
        "checkpoint show",
        "What a checkpoint holds: step, layout, sizes by kind and part. Reads the manifest only.",
        "glam checkpoint show runs/demo --tensors 'blocks.0.*/weight'",
    )
    show.add_argument("path", help=CHECKPOINT_HELP)
    show.add_argument(
        "--tensors",
        nargs="?",
        const="*",
        metavar="GLOB",
        help="list each tensor, or those whose name matches",
    )
    show.add_argument("--json", action="store_true", help=f"{JSON_HELP}, with the whole configuration and state")
    diff = verb(
        "checkpoint diff",
        "What differs between two checkpoints of any layouts. Exit code 0 if they hold the same tensors, 1 if names, "
        "shapes, types or values differ; differing configurations or states are told and do not count. Without "
        "--tolerance values are compared bit by bit; with it, by |a - b|, whatever their types. A NaN equals the same "
        "NaN only.",
        "glam checkpoint diff runs/a runs/b --tensors '*/weight' --tolerance 1e-6",
    )
    diff.add_argument("a", metavar="A", help=CHECKPOINT_HELP)
    diff.add_argument("b", metavar="B", help="the other one")
    diff.add_argument("--tolerance", type=float, metavar="T", help="largest |a - b| that passes for equal")
    diff.add_argument("--tensors", default="*", metavar="GLOB", help="only tensors whose name matches")
    diff.add_argument("--json", action="store_true", help=JSON_HELP)


def _checkpoint_makers(verb: MakeVerb) -> None:
    """Of new checkpoints that hold weights only; a run begins from one with train.start_from=FOLDER."""
    convert = verb(
        "checkpoint convert",
        "Write the weights alone, in a type of choice. A new run begins from them with train.start_from=OUT.",
        "glam checkpoint convert runs/demo --to weights --dtype bfloat16",
    )
    convert.add_argument("path", help=CHECKPOINT_HELP)
    average = verb(
        "checkpoint average",
        "Write the weighted mean of the weights of several checkpoints of one model. A new run begins from them with "
        "train.start_from=OUT.",
        "glam checkpoint average runs/demo --last 3 --to averaged",
    )
    average.add_argument("paths", nargs="+", metavar="path", help=f"{CHECKPOINT_HELP}; or one run, with --last")
    average.add_argument("--last", type=int, metavar="K", help="the newest K checkpoints of the one run that is named")
    average.add_argument("--shares", metavar="S,S,...", help="one for each checkpoint (default: equal ones)")
    upcycle = verb(
        "checkpoint upcycle",
        "Make a mixture of experts of a dense checkpoint: each expert begins as a copy of its layer's feed-forward "
        "part. A new run begins from it with train.start_from=OUT.",
        "glam checkpoint upcycle runs/dense --to upcycled --experts 8",
    )
    upcycle.add_argument("path", help=CHECKPOINT_HELP)
    upcycle.add_argument("--experts", type=int, required=True, metavar="E", help="experts a layer")
    upcycle.add_argument("--k", type=int, default=2, help="experts a token visits (default 2)")
    upcycle.add_argument(
        "--every", type=int, default=2, help="layers i with i %% every == offset get experts (default 2)"
    )
    upcycle.add_argument("--offset", type=int, default=0, help="(default 0)")
    upcycle.add_argument("--seed", type=int, default=0, help="of the routers (default 0)")
    for made in (convert, average, upcycle):
        _to(made)
    convert.add_argument("--dtype", choices=STORED_TYPES, default="float32", help="(default float32)")


def _checkpoint_borders(verb: MakeVerb) -> None:
    export = verb(
        "checkpoint export",
        "Write a checkpoint's weights as a folder that Hugging Face transformers loads.",
        "glam checkpoint export runs/demo --to hf --tokenizer data/demo/tokenizer",
    )
    export.add_argument("path", help=CHECKPOINT_HELP)
    export.add_argument("--dtype", choices=STORED_TYPES, default="bfloat16", help="(default bfloat16)")
    export.add_argument("--tokenizer", metavar="DIR", help="folder of the tokenizer that goes along")
    bring = verb(
        "checkpoint import",
        "Bring in a folder of Hugging Face transformers. A new run begins from it with train.start_from=OUT.",
        "glam checkpoint import Qwen3-30B-A3B --to imported",
    )
    bring.add_argument("folder", help="with config.json and *.safetensors")
    for made in (export, bring):
        _to(made)


def _to(maker: argparse.ArgumentParser) -> None:
    maker.add_argument("--to", required=True, metavar="OUT", help="a new folder")
    maker.add_argument("--json", action="store_true", help=JSON_HELP)
