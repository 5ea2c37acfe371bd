"""What `glam checkpoint` prints. The work is done in `checkpoint_tools.py` and `checkpoint_views.py`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from configs.errors import EXIT_DONE, EXIT_FAILED, UserError
from data_prep.progress import Reporter
from parallel.checkpoint_manifest import Manifest
from pretrain import checkpoint_tools as tools
from pretrain import checkpoint_views as views

if TYPE_CHECKING:
    from pretrain.huggingface import ExportReport, ImportReport
    from pretrain.upcycle import UpcycleReport

SHOWN = 20  # rows of a long list; --json has all


# ---- looking --------------------------------------------------------------------------------------------------------
def checkpoint_verify(args: Any) -> int:
    began = time.perf_counter()
    found = tools.verify_all(Path(args.path), _reporter(), args.threads or tools.THREADS)
    seconds, size = time.perf_counter() - began, sum(one.bytes for one in found)
    faults = sum(len(one.faults) for one in found)
    if args.json:
        checkpoints = [
            {"checkpoint": str(one.folder), "bytes": one.bytes, "faults": [asdict(fault) for fault in one.faults]}
            for one in found
        ]
        _print_json({"checkpoints": checkpoints, "faults": faults, "bytes": size, "seconds": seconds})
    else:
        for one in found:
            for fault in one.faults:
                print(f"{one.folder}: {fault}" if fault.file else fault.what)
        verdict = f"{faults} fault(s) in {sum(bool(one.faults) for one in found)} of them" if faults else "all sound"
        speed = f"{decimal(size)} in {seconds:.1f} s, {size / seconds / 1e9:.2f} GB/s"
        print(f"{len(found)} checkpoint(s) in {args.path}: {verdict}; {speed}")
    return EXIT_FAILED if faults else EXIT_DONE


def checkpoint_show(args: Any) -> None:
    with tools.open_checkpoint(Path(args.path)) as reader:
        folder, manifest = reader.folder, reader.manifest
    chosen = views.matching(manifest, args.tensors or "*")
    if not chosen and args.tensors:
        found = f"no tensor of {folder} matches {args.tensors!r}"
        raise UserError(found, f"a pattern for names such as {min(manifest.tensors, default='-')}", "mend --tensors")
    summary = views.summarise(manifest)
    if args.json:
        tensors = {name: views.describe(manifest, tensor) for name, tensor in chosen.items()}
        files = {file.name: file.bytes for file in manifest.files}
        tree = {"checkpoint": str(folder), "document": manifest.document, **asdict(summary), "files": files}
        _print_json({**tree, "tensors": tensors})
        return
    console = _console()
    console.print(_summary_table(folder, manifest, summary))
    if args.tensors:
        table = _table(f"{len(chosen)} of {len(manifest.tensors)} tensors", "tensor", "shape", "dtype")
        for column in ("boxes", "bytes"):
            table.add_column(column, justify="right")
        table.add_column("files", overflow="fold")
        for name, tensor in chosen.items():
            facts = views.describe(manifest, tensor)
            files = facts["files"][0] + (f" and {len(facts['files']) - 1} more" if len(facts["files"]) > 1 else "")
            table.add_row(name, str(facts["shape"]), tensor.dtype, str(facts["boxes"]), f"{tensor.num_bytes:,}", files)
        console.print(table)


def _summary_table(folder: Path, manifest: Manifest, summary: views.Summary) -> Table:
    document = manifest.document
    state, saved = document.get("state", {}), document.get("saved", {})
    table = _table(str(folder), "what", "how much")
    table.add_row("configuration", document.get("config", {}).get("name", "the model only"))
    for key in ("step", "updates", "tokens"):
        if key in state:
            table.add_row(key, f"{state[key]:,}")
    if saved:
        table.add_row("saved", f"{_when(saved['time'])} by start {saved['start']} of the run, torch {saved['torch']}")
    for key in ("layout", "tokenizers"):
        if document.get(key):
            table.add_row(key, _line(document[key]))
    for key, value in _origin_rows(document.get("origin", {})):
        table.add_row(key, value)
    table.add_section()
    table.add_row("files", f"{summary.files:,}, {decimal(summary.bytes)}")
    for kind, total in summary.kinds.items():
        table.add_row(kind, f"{total.tensors:,} tensors, {total.values:,} values, {decimal(total.bytes)}")
    if summary.parts:
        table.add_section()
    for part, parameters in summary.parts.items():
        table.add_row(f"parameters: {part.replace('_', ' ')}", f"{parameters:,}")
    if summary.parts:
        table.add_row("parameters", f"{sum(summary.parts.values()):,}")
    return table


def _origin_rows(origin: dict[str, Any], depth: int = 0) -> list[tuple[str, str]]:
    """Where weights come from, and where those came from in turn."""
    head = "  " * depth + ("from" if depth else "origin")
    plain = {key: value for key, value in origin.items() if key not in ("sources", "time", "origin")}
    if "time" in origin:
        plain["made"] = _when(origin["time"])
    rows = [(head, _line(plain))] if plain else []
    for source in [*origin.get("sources", []), *([origin["origin"]] if "origin" in origin else [])]:
        rows += _origin_rows(source, depth + 1)
    return rows


def checkpoint_diff(args: Any) -> int:
    if args.tolerance is not None and not args.tolerance >= 0:
        raise UserError(f"--tolerance {args.tolerance}", "at least 0", "leave it out to compare bit by bit")
    with tools.open_checkpoint(Path(args.a)) as a, tools.open_checkpoint(Path(args.b)) as b:
        found = views.compare(a, b, args.tensors, _reporter())
        folders = a.folder, b.folder
    equal = found.equal(args.tolerance)
    if args.json:
        _print_json({"a": str(folders[0]), "b": str(folders[1]), **views.to_json(found, args.tolerance)})
        return EXIT_DONE if equal else EXIT_FAILED
    print(f"A: {folders[0]}\nB: {folders[1]}")
    console = _console()
    for section, rows in found.documents.items():
        if rows:
            table = _table(f"{section}: {len(rows)} difference(s)", "key", "A", "B")
            for key, here, there in rows:
                table.add_row(key, _short(here), _short(there))
            console.print(table)
    _print_names("only in A", found.only_a)
    _print_names("only in B", found.only_b)
    _print_names("of other shapes", [f"{name} {list(a)} {list(b)}" for name, (a, b) in found.shapes.items()])
    unlike = found.differing(args.tolerance)
    if unlike:
        console.print(_unlike_table(unlike))
    bit_equal = sum(one.bit_equal for one in found.compared)
    within = len(found.compared) - bit_equal - len(unlike)
    print(
        f"tensors: {bit_equal} bit-equal"
        + (f", {within} within {args.tolerance:g}" if within else "")
        + f", {len(unlike)} of other values or types, {len(found.shapes)} of other shapes, {len(found.only_a)} only "
        f"in A, {len(found.only_b)} only in B: {'equal' if equal else 'they differ'}"
    )
    return EXIT_DONE if equal else EXIT_FAILED


def _unlike_table(unlike: Sequence[views.Compared]) -> Table:
    more = f", the first {SHOWN}" if len(unlike) > SHOWN else ""
    table = _table(f"tensors that differ: {len(unlike)}{more}", "tensor", "dtype")
    for column in ("values that differ", "of them not finite", "max |a - b|", "relative (L2)"):
        table.add_column(column, justify="right")
    for one in unlike[:SHOWN]:
        dtype = one.dtypes[0] if one.dtypes[0] == one.dtypes[1] else " and ".join(one.dtypes)
        counts = f"{one.differing:,} of {one.values:,}", f"{one.nonfinite:,}"
        table.add_row(one.name, dtype, *counts, f"{one.max_abs:.3g}", f"{one.relative:.3g}")
    return table


def _print_names(title: str, names: Sequence[str]) -> None:
    for name in names[:SHOWN]:
        print(f"{title}: {name}")
    if len(names) > SHOWN:
        print(f"{title}: and {len(names) - SHOWN} more")


# ---- making ---------------------------------------------------------------------------------------------------------
def checkpoint_convert(args: Any) -> None:
    _tell_made(args, tools.convert(Path(args.path), Path(args.to), args.dtype, _reporter()))


def checkpoint_average(args: Any) -> None:
    paths = [Path(path) for path in args.paths]
    if args.last is not None:
        if len(paths) > 1:
            raise UserError(f"--last with {len(paths)} paths", "one run", "leave out --last, or the other paths")
        paths = tools.newest(paths[0], args.last)
    try:
        shares = [float(share) for share in args.shares.split(",")] if args.shares is not None else None
    except ValueError:
        remedy = "write for example 0.5,0.3,0.2"
        raise UserError(f"--shares {args.shares}", "numbers with commas between them", remedy) from None
    _tell_made(args, tools.average(paths, Path(args.to), shares, _reporter()))


def _tell_made(args: Any, made: Manifest) -> None:
    summary = views.summarise(made)
    total, types = summary.kinds["weight"], sorted({tensor.dtype for tensor in made.tensors.values()})
    if args.json:
        facts = {"tensors": total.tensors, "parameters": total.values, "bytes": summary.bytes, "dtypes": types}
        _print_json({"checkpoint": args.to, **facts, "origin": made.document["origin"]})
        return
    for source in made.document["origin"]["sources"]:
        print(f"from {_line({key: value for key, value in source.items() if key != 'origin'})}")
    print(f"{args.to}: {total.values:,} parameters, {' and '.join(types)}, {decimal(summary.bytes)}")
    print(f"a new run begins from it with train.start_from={args.to}")


def checkpoint_upcycle(args: Any) -> None:
    from pretrain.upcycle import upcycle

    numbers = args.experts, args.k, args.every, args.offset, args.seed
    _tell_report(args, upcycle(Path(args.path), Path(args.to), *numbers, reporter=_reporter()))


def checkpoint_export(args: Any) -> None:
    from pretrain.huggingface import export_folder

    tokenizer = Path(args.tokenizer) if args.tokenizer else None
    _tell_report(args, export_folder(Path(args.path), Path(args.to), args.dtype, tokenizer, reporter=_reporter()))


def checkpoint_import(args: Any) -> None:
    from pretrain.huggingface import import_folder

    _tell_report(args, import_folder(Path(args.folder), Path(args.to), reporter=_reporter()))


def _tell_report(args: Any, report: ExportReport | ImportReport | UpcycleReport) -> None:
    facts = {key: str(value) if isinstance(value, Path) else value for key, value in vars(report).items()}
    if args.json:
        _print_json(facts)
        return
    notes = facts.pop("notes", ())
    for key, value in facts.items():
        shown = ", ".join(map(str, value)) if isinstance(value, tuple) else value
        print(f"{key.replace('_', ' ')}: {shown:,}" if isinstance(shown, int) else f"{key.replace('_', ' ')}: {shown}")
    for note in notes:
        print(f"note: {note}")
    if args.verb != "checkpoint export":
        print(f"a new run begins from it with train.start_from={args.to}")


# ---- how it looks ---------------------------------------------------------------------------------------------------
def _reporter() -> Reporter:
    return Reporter(Console(stderr=True))


def _console() -> Console:
    console = Console(markup=False, highlight=False)  # names and offsets bear brackets
    if not console.is_terminal:
        console.width = 160  # a log file has no edge
    return console


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", min_width=len(title))  # a title is not broken
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _print_json(tree: dict[str, Any]) -> None:
    print(json.dumps(tree))


def _when(seconds: float) -> str:
    return time.strftime("%F %T", time.localtime(seconds))


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _line(facts: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in facts.items())
