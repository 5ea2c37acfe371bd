"""The last steps: what the stages left becomes the parts of an output folder."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from configs.base import fingerprint_of
from configs.corpus import CorpusConfig, JsonLines, SourceSpec, TextTree
from configs.errors import UserError
from data_prep.documents import Job, heldout_limit, origin, reject_line
from data_prep.manifest import ShardInfo, write_manifest
from data_prep.output import CONFIG, READY, is_assembled, say_assembled
from data_prep.quality import CLASSIFIER
from data_prep.stages import Counts
from data_prep.storage import remove_temporary, write_atomically, written_atomically
from data_prep.summary import SUMMARY, PrepSummary, SideSummary, SourceSummary
from data_prep.tokenizing import HELDOUT, SIDES
from data_prep.units import Unit

_SHOWN = 3


def assemble(
    config: CorpusConfig,
    files: list[list[Path]],
    made_from: dict[str, str],
    units: list[Unit],
    counts: dict[str, Counts],
    work: Path,
) -> PrepSummary:
    """Put all parts into one folder of the workspace, and say so; may be stopped anywhere and done again."""
    ready, output = work / READY, Path(config.output)
    summary = _summary(config, files, made_from, counts)
    if is_assembled(work, fingerprint_of(config.makes)):
        return summary
    (ready / "tokenizer").mkdir(parents=True, exist_ok=True)
    for path in (work / "tokenizer" / "files").iterdir():
        shutil.copyfile(path, ready / "tokenizer" / path.name)
    if "quality" in counts and (work / "quality" / CLASSIFIER).is_file():
        (ready / "quality").mkdir(exist_ok=True)
        shutil.copyfile(work / "quality" / CLASSIFIER, ready / "quality" / CLASSIFIER)
    for side in SIDES:  # moved, as they are large; whatever is remade, the stage they are of is remade too
        if (work / "tokenize" / "datasets" / side).exists():
            os.replace(work / "tokenize" / "datasets" / side, ready / side)
    remove_temporary(ready)
    for dataset in summary.datasets:
        _write_manifest(config, files, counts, ready, dataset)
    _gather_rejects(config, units, counts, work, ready / "rejects")
    write_atomically(ready / CONFIG, config.dump().encode())
    write_atomically(ready / "data.yaml", data_section(config, summary, output).encode())
    write_atomically(ready / SUMMARY, summary.to_json())
    say_assembled(work, fingerprint_of(config.makes))
    return summary


def shards_are_there(counts: Counts, folder: Path, config: CorpusConfig) -> bool:
    """Whether the shards of a finished stage `tokenize` are where it put them, or stand ready, or are published."""
    work = folder.parent
    places = [folder / "datasets", work / READY]
    places += [Path(config.output)] if is_assembled(work, fingerprint_of(config.makes)) else []
    return all(
        any((place / side / name / f"{shard['name']}.bin").is_file() for place in places)
        for name, sides in counts["sources"].items()
        for side, found in sides.items()
        for shard in found.get("shards", ())
    )


def _summary(
    config: CorpusConfig, files: list[list[Path]], made_from: dict[str, str], counts: dict[str, Counts]
) -> PrepSummary:
    sides = counts["tokenize"]["sources"]
    datasets = tuple(
        SideSummary(name, side, len(found["shards"]), found["documents"], found["tokens"], found["bytes"])
        for name, by_side in sides.items()
        for side in SIDES
        if (found := by_side[side])["documents"]
    )
    deciding = [stage for stage in ("read", "clean", "dedup", "quality") if stage in counts]
    sources = tuple(
        SourceSummary(s.name, s.weight, len(paths), {stage: counts[stage]["sources"][s.name] for stage in deciding})
        for s, paths in zip(config.sources, files, strict=True)
    )
    tokenizer = counts["tokenizer"]
    return PrepSummary(
        Path(config.output),
        fingerprint_of(config.makes),
        made_from,
        tokenizer["sha256"],
        tokenizer["vocab_size"],
        datasets,
        sources,
        counts.get("quality", {}).get("classifier"),
    )


def _write_manifest(
    config: CorpusConfig, files: list[list[Path]], counts: dict[str, Counts], ready: Path, dataset: SideSummary
) -> None:
    number = next(n for n, source in enumerate(config.sources) if source.name == dataset.source)
    shards = counts["tokenize"]["sources"][dataset.source][dataset.side]["shards"]
    write_manifest(
        ready / dataset.side / dataset.source,
        name=dataset.source,
        weight=config.sources[number].weight,
        records=record_noun(config.sources[number]),
        vocab_size=counts["tokenizer"]["vocab_size"],
        eos_id=counts["tokenizer"]["eos_id"],
        tokenizer_sha256=counts["tokenizer"]["sha256"],
        tokenizer="../../tokenizer",
        configuration=fingerprint_of(config.makes),
        shards=[ShardInfo(**shard) for shard in shards],
        sources=[str(path) for path in files[number]],
    )


def record_noun(source: SourceSpec) -> str:
    """What one document is in its file."""
    return "file" if isinstance(source, TextTree) else "line" if isinstance(source, JsonLines) else "row"


def _gather_rejects(config: CorpusConfig, units: list[Unit], counts: dict[str, Counts], work: Path, to: Path) -> None:
    """One file a stage, in the order of documents."""
    to.mkdir(exist_ok=True)
    with written_atomically(to / "read.jsonl") as out:
        for unit in _as_read(config, units):
            for found in _json_lines(work / "read" / f"{unit.name}.rejects.jsonl"):
                out.write(reject_line(config, unit, _read_place(unit, found), "unreadable", found["reason"]))
    for stage in (stage for stage in ("clean", "dedup", "quality") if stage in counts):
        with written_atomically(to / f"{stage}.jsonl") as out:
            for unit in units:
                path = work / stage / f"{unit.name}.rejects.jsonl"
                if path.is_file():
                    with path.open("rb") as part:
                        shutil.copyfileobj(part, out)


def _as_read(config: CorpusConfig, units: list[Unit]) -> list[Unit]:
    """The units of the stage `read`, before they were refined: of other names, but with their first records."""
    whole = [unit for unit in units if unit.skip == 0]
    return [dataclasses.replace(unit, number=unit.read_as, take=None) for unit in whole]


def data_section(config: CorpusConfig, summary: PrepSummary, output: Path) -> str:
    """The `data` section of a run that trains on this corpus, as YAML."""
    train = {dataset.source for dataset in summary.datasets if dataset.side != HELDOUT}
    lines = ["data:", "  sources:"]
    for source in config.sources:
        if source.name in train:
            path = json.dumps(str(output / "train" / source.name))
            lines.append(f"    - {{name: {source.name}, path: {path}, weight: {source.weight}}}")
    heldout = [str(output / d.side / d.source) for d in summary.datasets if d.side == HELDOUT]
    return "\n".join([*lines, f"  heldout: {json.dumps(heldout)}"]) + "\n"


def refuse_empty(
    config: CorpusConfig, units: list[Unit], work: Path, deciding: tuple[str, ...], counts: dict[str, Counts]
) -> None:
    """
    Raises:
        UserError: a source has nothing to train on, or nothing at all is held out.
    """
    train, heldout = [0] * len(config.sources), 0
    for unit in units:
        job = Job(config, work, unit, deciding)
        held = job.rows()["side"][job.left()] < heldout_limit(config)
        heldout += int(np.count_nonzero(held))
        train[unit.source] += int(np.count_nonzero(~held))
    for source, number in zip(config.sources, train, strict=True):
        if number == 0:
            refuse_source(source.name, _story(source.name, counts), first_rejects(config, units, work, source.name))
    if config.heldout_fraction > 0 and heldout == 0:
        remedy = "raise heldout_fraction, change seed, add documents, or set heldout_fraction=0"
        found = f"no held-out document among {sum(train)}"
        raise UserError(found, f"some, with heldout_fraction={config.heldout_fraction}", remedy)


def refuse_source(name: str, found: str, rejects: str) -> None:
    """
    Raises:
        UserError: always; shows some of what was left out.
    """
    remedy = f"mend, loosen or remove the source; the first rejects: {rejects}"
    raise UserError(f"source {name!r}: no document to train on ({found})", "at least one", remedy)


def _story(name: str, counts: dict[str, Any]) -> str:
    read, clean, dedup = (counts[stage]["sources"][name] for stage in ("read", "clean", "dedup"))
    story = f"{read['documents']} read, {read['rejects']} unreadable, {sum(clean['rules'].values())} unclean, "
    story += f"{dedup['exact'] + dedup['near']} duplicates"
    if "quality" in counts:
        story += f", {dedup['kept'] - counts['quality']['sources'][name]['kept']} by quality"
    return story + ", the rest held out"


def first_rejects(config: CorpusConfig, units: list[Unit], work: Path, name: str) -> str:
    """A few of the records of a source that could not be read, or were not clean, to show."""
    shown: list[str] = []
    own = [unit for unit in units if config.sources[unit.source].name == name]
    for unit in _as_read(config, own):
        for found in _json_lines(work / "read" / f"{unit.name}.rejects.jsonl"):
            shown.append(f"{origin(config, unit, *_read_place(unit, found))}: {found['reason']}")
            if len(shown) == _SHOWN:
                return "; ".join(shown)
    for unit in own:
        for found in _json_lines(work / "clean" / f"{unit.name}.rejects.jsonl"):
            shown.append(f"{found['origin']}: {found['rule']}: {found['reason']}")
            if len(shown) == _SHOWN:
                return "; ".join(shown)
    return "; ".join(shown) or "none"


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_file():
        with path.open("rb") as file:
            yield from (json.loads(line) for line in file)


def _read_place(unit: Unit, found: dict[str, Any]) -> tuple[int, int]:
    """File and record that the stage `read` left out: it counted from the unit's start."""
    return found["file"], unit.first_record + found["record"]
