"""What `glam prep` and its views do."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from configs.corpus import CorpusConfig
from configs.errors import EXIT_FAILED, UserError
from slurm.environ import LaunchEnv

# Set for each rank by the process managers of MPICH, Open MPI and SLURM's pmi2 and pmix.
_MPI_RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK")


def prep(args: Any) -> None:
    from data_prep.pipeline import STAGES, prepare

    mpi = any(name in os.environ for name in _MPI_RANK_VARIABLES)
    env = LaunchEnv.read()
    if env.launcher == "srun" and env.world_size > 1 and not mpi:
        found = f"{env.world_size} tasks started by srun without MPI: each would do everything"
        raise UserError(found, "ranks that know of each other", "add --mpi=pmi2 to srun (see srun --mpi=list)")
    overrides = [*args.overrides, *([f"workers={args.workers}"] if args.workers is not None else [])]
    config = CorpusConfig.load(args.config, overrides)
    prepare(config, _console(), until=args.stage or STAGES[-1], redo=args.redo, mpi=mpi)


def _console() -> Console:
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a log file has no edge
    return console


def prep_verify(args: Any) -> int:
    from data_prep.progress import Reporter
    from data_prep.verify import find_datasets, verify_all
    from data_prep.workers import make_workers

    folder, console = Path(args.folder), Console(stderr=True)
    datasets = find_datasets(folder)
    with make_workers(args.workers, mpi=False) as workers:
        assert workers is not None
        damages = verify_all(folder, workers, Reporter(console))
    if args.json:
        print(json.dumps({"datasets": [str(d) for d in datasets], "damages": [vars(d) for d in damages]}))
    else:
        for damage in damages:
            print(damage)
        print(f"{len(datasets)} dataset(s) in {folder}: " + (f"{len(damages)} fault(s)" if damages else "all sound"))
    return EXIT_FAILED if damages else 0


def prep_explain(args: Any) -> None:
    from pretrain.explain import as_rows, batch_documents

    seen = batch_documents(Path(args.run), args.step, args.rank)
    if args.json:
        print(json.dumps({"step": args.step, "documents": as_rows(seen)}))
        return
    table = Table(title=f"{args.run}, step {args.step}: {len(seen)} documents or parts of some")
    for column in ("sequence", "rank", "source", "document", "tokens", "first line"):
        table.add_column(column, overflow="fold" if column == "document" else "ellipsis", no_wrap=column != "document")
    previous = None
    for one in seen:
        part = f"{one.first_token}..{one.first_token + one.tokens}"
        head = ("", "") if one.sequence == previous else (str(one.sequence), str(one.data_rank))
        table.add_row(*head, f"{one.source} (epoch {one.epoch})", one.origin, part, one.first_line)
        previous = one.sequence
    _console().print(table)


def prep_stats(args: Any) -> None:
    from data_prep.stats import corpus_stats, plot_stats, stats_tables

    folder = Path(args.folder).resolve()
    stats = corpus_stats(folder)
    picture = plot_stats(stats, Path(args.out) if args.out else folder.with_name(f"{folder.name}.stats.png"))
    if args.json:
        print(json.dumps({**stats.to_json(), "picture": str(picture)}))
        return
    for table in stats_tables(stats):
        _console().print(table)
    print(picture)


def prep_quality(args: Any) -> None:
    from data_prep.quality import Classifier

    model = Classifier(args.classifier)
    table = Table(title=f"{args.classifier}: {model.weight.shape[1]:,} features", show_header=False)
    for key in ("auc", "documents"):
        table.add_row(key.replace("_", " "), str(model.facts.get(key)))
    for side, words in model.facts.get("words", {}).items():
        table.add_row(f"words that speak for {side}", " ".join(words))
    _console().print(table)
    if args.text:
        try:
            text = Path(args.text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{args.text}: {error}", "a text file in UTF-8", "mend --text") from None
        print(f"{args.text}: score {model.scores([text])[0]:.4f}")
