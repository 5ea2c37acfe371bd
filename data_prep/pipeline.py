"""`glam prep`: raw sources in, a tokenizer and verified token shards out.

    OUTPUT/tokenizer/            the tokenizer, and token_bytes.npy
    OUTPUT/quality/              the classifier, if there is one
    OUTPUT/train/<source>/       shards and manifest.json (data_prep.format)
    OUTPUT/heldout/<source>/     the same, for the documents kept from training
    OUTPUT/rejects/<stage>.jsonl what was left out: source, origin, rule, reason
    OUTPUT/corpus.yaml           the configuration
    OUTPUT/data.yaml             the `data` section of a run that trains on this corpus
    OUTPUT/summary.json          counts; written last
    OUTPUT/work/                 while it is being made

Stages follow one another; each is cut into tasks by unit (data_prep.units), whose results stand in files. So a killed
run goes on where it was, and the outcome is the same for any number of workers. Memory a worker: a few units' text.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console

from configs.corpus import CorpusConfig
from configs.errors import UserError
from data_prep import assemble, dedup, quality, reading, tokenizing
from data_prep.documents import Job, load_unit, save_unit
from data_prep.output import (
    PARTS,
    TRASH,
    WORK,
    find_complete,
    forget_assembled,
    opened,
    publish_parts,
    remove_leftover,
)
from data_prep.progress import Reporter
from data_prep.rules import first_fault
from data_prep.stage_facts import stage_keys, stage_table
from data_prep.stages import Counts, Task, Workspace, add_counts, changed_stages, remove_stage
from data_prep.storage import sha256_file
from data_prep.summary import PrepSummary
from data_prep.tokenizer import open_source
from data_prep.units import Unit, cut_into_units, list_files, refine, source_state
from data_prep.workers import Workers, make_workers

STAGES = ("read", "clean", "dedup", "quality", "tokenizer", "tokenize")


def prepare(
    config: CorpusConfig,
    console: Console | None = None,
    *,
    until: str = STAGES[-1],
    redo: bool = False,
    mpi: bool = False,
) -> PrepSummary | None:
    """Make the corpus of ``config``, or say that it is there.

    Args:
        until: the last stage to do; a later call goes on from there.
        redo: remake what a changed configuration or changed sources touch, instead of refusing.
        mpi: this process is one rank of an MPI job; all ranks call this together.

    Returns:
        None where ``until`` ended it early, and on MPI ranks other than the first.

    Raises:
        UserError: no text, no held-out text, a vocabulary that does not fit, another corpus in the way, a full disk.
            What is done is kept: the same command goes on from it.
    """
    with make_workers(config.workers, mpi) as workers:
        return _prepare(config, Reporter(console), workers, until, redo) if workers is not None else None


def _prepare(config: CorpusConfig, reporter: Reporter, workers: Workers, until: str, redo: bool) -> PrepSummary | None:
    output = Path(config.output)
    files = [list_files(source) for source in config.sources]
    files = [_outside(paths, output) for paths in files]
    made_from = {"source files": source_state(files), **_files_of_others(config)}
    try:
        summary = find_complete(output, config, made_from)
    except UserError:
        if not redo:
            raise
        summary = None
    if summary is not None:
        remove_leftover(output)
        reporter.say(f"{output}: already prepared")
        reporter.show(summary.table())
        return summary
    load_unit.cache_clear()  # of an earlier call in this process
    dedup.rows_of.cache_clear()
    with opened(output, redo) as work:
        making = _Making(config, files, made_from, Workspace(work, workers, reporter))
        if redo and (changed := changed_stages(work, making.keys, STAGES)):
            reporter.say(f"remaking from the stage {changed[0]} on")
            forget_assembled(work)
            for stage in changed:
                remove_stage(work / stage)
        for stage in STAGES[: STAGES.index(until) + 1]:
            making.do(stage)
        if until != STAGES[-1]:
            reporter.say(f"stopped after the stage {until}, as asked; its files are in {work / until}")
            return None
        summary = assemble.assemble(config, files, made_from, making.units, making.counts, work)
        publish_parts(output)
    summary = dataclasses.replace(summary, seconds=reporter.seconds)
    reporter.show(summary.table())
    return summary


def _outside(files: list[Path], output: Path) -> list[Path]:
    """Without what we wrote ourselves, where a source's folder holds the output.

    Raises:
        UserError: another file lies in the output.
    """
    inside, ours = str(output.resolve()) + os.sep, {WORK, TRASH, *PARTS}
    outside = []
    for file in files:
        whole = str(file.resolve())
        if not whole.startswith(inside):
            outside.append(file)
        elif whole[len(inside) :].split(os.sep)[0] not in ours:
            found = f"the source file {file} lies in the output {output}"
            raise UserError(found, "sources outside of it", "choose another output=PATH")
    return outside


def _files_of_others(config: CorpusConfig) -> dict[str, str]:
    """Hashes of the tokenizer and the classifier brought along.

    Raises:
        UserError: one of them is unfit: told before hours of work, not after.
    """
    found = {}
    if config.tokenizer.kind != "train_sentencepiece":
        tokenizer = open_source(config.tokenizer)
        found["tokenizer file"] = f"{tokenizer.sha256} {tokenizer.eos_token}"
    for spec in {spec for number in range(len(config.sources)) for spec in config.filters_of(number)}:
        if spec.kind == "language":
            first_fault("any", [spec])
    if config.quality is not None and config.quality.kind == "classifier_file":
        quality.Classifier(config.quality.path)
        found["classifier file"] = sha256_file(Path(config.quality.path))
    return found


@dataclass
class _Making:
    """A corpus in the making: its stages, in order."""

    config: CorpusConfig
    files: list[list[Path]]
    made_from: dict[str, str]
    space: Workspace

    def __post_init__(self) -> None:
        self.units: list[Unit] = cut_into_units(self.config, self.files)
        self.counts: dict[str, Counts] = {}
        self.keys = stage_keys(self.config, self.made_from)
        self.deciding: tuple[str, ...] = ()  # stages so far that may drop documents

    def do(self, stage: str) -> None:
        """Do one stage, or find it done, and show its table."""
        if stage == "quality" and self.config.quality is None:
            self.space.key = {**self.space.key, stage: self.keys[stage]}
            return
        folder = self.space.open_stage(stage, self.keys[stage])
        counts = self.space.finished(stage)
        if stage == STAGES[-1] and counts is not None and not assemble.shards_are_there(counts, folder, self.config):
            remove_stage(folder)  # they were moved to be published, and have been forgotten since
            folder, counts = self.space.open_stage(stage, self.keys[stage]), None
        if counts is None:
            forget_assembled(self.space.folder)
            counts = self.space.close_stage(stage, getattr(self, f"_{stage}")(folder))
        self.counts[stage] = counts
        if stage == "read":
            self.units = refine(self.units, counts.pop("records"), counts.pop("cuts"))
            self._refuse_rejects(counts)
        if stage in ("clean", "dedup", "quality"):
            self.deciding += (stage,)
        if stage in ("read", "clean", "dedup", "quality"):  # what comes of the others, the last table tells
            self.space.reporter.show(stage_table(stage, counts))

    # ---- stages: each returns {"sources": {name: counts}, ...} -------------------------------------------
    def _read(self, folder: Path) -> Counts:
        found = self._each_unit("read", folder, "", reading.read_task)
        records, cuts = [part["records"] for part in found], [part["cuts"] for part in found]
        by_source = self._by_source([part["counts"] for part in found])
        for unit in refine(self.units, records, cuts):
            save_unit(self.space.folder, unit)
        return {**by_source, "records": records, "cuts": cuts}

    def _clean(self, folder: Path) -> Counts:
        return self._by_source(self._each_unit("clean", folder, "", reading.clean_task))

    def _dedup(self, folder: Path) -> Counts:
        entries = self._each_unit("dedup: signatures", folder, "s", dedup.signatures_task)
        ranges = dedup.num_ranges(sum(part["entries"] for part in entries))
        names, weight = [unit.name for unit in self.units], self._bytes // ranges
        tasks = [Task(dedup.range_name(n), dedup.meet_task, (folder, names, n, ranges), weight) for n in range(ranges)]
        self.space.run("dedup: meet", folder, tasks)
        return self._by_source(self._each_unit("dedup: judge", folder, "j", dedup.judge_task, ranges))

    def _quality(self, folder: Path) -> Counts:
        spec = self.config.quality
        assert spec is not None
        learned: Counts | None = None
        if spec.kind == "train_classifier":
            learned = self._train_classifier(spec, folder)
        path = folder / quality.CLASSIFIER if spec.kind == "train_classifier" else Path(spec.path)
        tasks = [
            Task(unit.name, quality.score_task, (self._job(unit), path, spec.pareto_alpha), unit.bytes)
            if self._name(unit) in spec.filter
            else Task(unit.name, quality.pass_task, (self._job(unit),), unit.bytes)
            for unit in self.units
        ]
        counts = self._by_source(self.space.run("quality: score", folder, tasks))
        return {**counts, "classifier": learned or quality.Classifier(path).facts}

    def _train_classifier(self, spec: Any, folder: Path) -> Counts:
        kept = self.counts["dedup"]["sources"]
        classes = {"curated": spec.curated, "other": spec.filter}
        share: dict[str, float] = {}
        for members in classes.values():
            held = sum(kept[name]["bytes"] for name in members)
            share |= {name: min(1.0, spec.sample_bytes / max(1, held)) for name in members}
        units = [unit for unit in self.units if self._name(unit) in share]
        tasks = [
            Task(f"{unit.name}.sample", quality.sample_task, (self._job(unit), share[self._name(unit)]), unit.bytes)
            for unit in units
        ]
        self.space.run("quality: sample", folder, tasks)
        paths = {
            name: [self._job(u).path("quality", "sample.jsonl") for u in units if self._name(u) in members]
            for name, members in classes.items()
        }
        task = Task("classifier", quality.train_task, (spec, self.config.seed, *paths.values(), folder), 1)
        return self.space.run("quality: train", folder, [task])[0]

    def _tokenizer(self, folder: Path) -> Counts:
        spec, samples = self.config.tokenizer, []
        assemble.refuse_empty(self.config, self.units, self.space.folder, self.deciding, self.counts)
        if spec.kind == "train_sentencepiece":
            left = self.counts[self.deciding[-1]]["sources"]
            total = sum(source.weight for source in self.config.sources)
            share = {
                source.name: min(1.0, spec.sample_bytes * source.weight / total / max(1, left[source.name]["bytes"]))
                for source in self.config.sources
            }
            tasks = [
                Task(
                    unit.name,
                    tokenizing.sample_task,
                    (self._job(unit), share[self._name(unit)], spec.sample_bytes),
                    unit.bytes,
                )
                for unit in self.units
            ]
            self.space.run("tokenizer: sample", folder, tasks)
            samples = [self._job(unit).path("tokenizer", "sample.txt") for unit in self.units]
        task = Task("trained", tokenizing.tokenizer_task, (spec, samples, folder / "files"), 1)
        counts = self.space.run("tokenizer", folder, [task])[0]
        if not counts["lossless"]:
            self.space.reporter.say(
                "warning: this tokenizer loses some text (spaces or rare characters); bits per byte are approximate"
            )
        return counts

    def _tokenize(self, folder: Path) -> Counts:
        tokenizer = self.space.folder / "tokenizer" / "files"
        found = self._each_unit("tokenize", folder, "", tokenizing.encode_task, tokenizer)
        sides = self._by_source(found)["sources"]
        members = {
            source.name: [unit.name for unit in self.units if unit.source == number]
            for number, source in enumerate(self.config.sources)
        }
        groups = [(name, side) for side in tokenizing.SIDES for name in members if sides[name][side]["documents"]]
        plans = self.space.run("shards: plan", folder, [
            Task(
                f"{side}.{name}.plan",
                tokenizing.plan_task,
                (folder, members[name], side, self.config.shard_tokens),
                sides[name][side]["tokens"],
            )
            for name, side in groups
        ])  # fmt: skip
        tasks, owners = [], []
        for (name, side), plan in zip(groups, plans, strict=True):
            target = folder / "datasets" / side / name
            target.mkdir(parents=True, exist_ok=True)
            cuts = plan["cuts"]
            for index, cut in enumerate(pairwise(cuts)):
                arguments = (folder, members[name], side, index, cut, tokenizer, target)
                weight = sides[name][side]["tokens"] // (len(cuts) - 1)
                tasks.append(Task(f"{side}.{name}.{index:05d}", tokenizing.shard_task, arguments, weight))
                owners.append((name, side))
        shards = self.space.run("shards: write", folder, tasks)
        for owner, shard in zip(owners, shards, strict=True):
            sides[owner[0]][owner[1]].setdefault("shards", []).append(shard["shard"])
        return {"sources": sides}

    # ---- helpers -----------------------------------------------------------------------------------------
    def _job(self, unit: Unit) -> Job:
        return Job(self.config, self.space.folder, unit, self.deciding)

    def _name(self, unit: Unit) -> str:
        return self.config.sources[unit.source].name

    @property
    def _bytes(self) -> int:
        return sum(unit.bytes for unit in self.units)

    def _each_unit(self, label: str, folder: Path, suffix: str, run: Any, *arguments: Any) -> list[Counts]:
        end = f".{suffix}" if suffix else ""
        tasks = [Task(unit.name + end, run, (self._job(unit), *arguments), unit.bytes) for unit in self.units]
        return self.space.run(label, folder, tasks)

    def _by_source(self, parts: Sequence[Counts]) -> Counts:
        sources = {
            source.name: add_counts([part for part, unit in zip(parts, self.units) if unit.source == number])
            for number, source in enumerate(self.config.sources)
        }
        return {"sources": sources}

    def _refuse_rejects(self, counts: Counts) -> None:
        most = self.config.max_reject_fraction
        for name, found in counts["sources"].items():
            records = found["documents"] + found["rejects"]
            if found["documents"] == 0:  # told now, not after the other stages
                assemble.refuse_source(name, f"0 of {records:,} records are documents", self._first_rejects(name))
            if found["rejects"] > most * records:
                raise UserError(
                    f"source {name!r}: {found['rejects']:,} of {records:,} records cannot be read; "
                    f"the first: {self._first_rejects(name)}",
                    f"at most {most:.2%} (max_reject_fraction)",
                    "mend the source, or allow more",
                )

    def _first_rejects(self, name: str) -> str:
        return assemble.first_rejects(self.config, self.units, self.space.folder, name)
