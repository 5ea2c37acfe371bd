"""Checkpoints out to Hugging Face transformers, and in from there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from data_prep.progress import Reporter
from data_prep.storage import write_atomically
from data_prep.tokenizer_export import export_tokenizer
from data_prep.tokenizer_files import HUGGINGFACE_FILE
from parallel.checkpoint_serial import LazyTensor, runs_of
from pretrain import budget
from pretrain.huggingface_config import (
    CONFIG_FILE,
    OWN,
    TheirModel,
    architecture_of,
    departures,
    from_huggingface,
    to_huggingface,
)
from pretrain.huggingface_names import Counterpart, counterparts, stacked_form
from pretrain.huggingface_shards import SHARD_BYTES, Shards, num_bytes, write_shards
from pretrain.huggingface_tokenizer import FoundTokenizer, find_tokenizer
from pretrain.weights import Origin, WeightReader, new_folder, open_weights, write_weights

DTYPES = ("float32", "bfloat16", "float16")
_README = "README.md"
_UNKNOWN_LENGTH = 32_768  # where nothing says on what length a model was trained


# ---- out ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes:
        architecture: the class of transformers that loads it, or "GLaM": none does.
        files: their names.
        bytes: of all of them.
        notes: what a user must know, one sentence each; also in the folder's README.md.
    """

    folder: Path
    architecture: str
    dtype: str
    parameters: int
    files: tuple[str, ...]
    bytes: int
    notes: tuple[str, ...]


def export_folder(
    checkpoint: Path,
    out: Path,
    dtype: str = "bfloat16",
    tokenizer: Path | None = None,
    shard_bytes: int = SHARD_BYTES,
    reporter: Reporter | None = None,
) -> ExportReport:
    """Write the weights of a checkpoint, or of the newest of a run, as a Hugging Face folder; whole or not at all.

    Args:
        tokenizer: a tokenizer's folder or file; None: that of the run's data.

    Raises:
        UserError: damage, a value that `dtype` does not hold, another tokenizer than the data's, or `out` cannot be
            made.
    """
    reporter = reporter or Reporter(None)
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype}", f"one of {', '.join(DTYPES)}", "choose one of these")
    with open_weights(checkpoint) as weights:
        architecture = architecture_of(weights.model)
        pairs = counterparts(weights.model, architecture)
        tensors = [tensor for pair in pairs for tensor in _theirs(weights, pair, dtype)]
        found = find_tokenizer(weights, tokenizer)
        need = sum(num_bytes(tensor) for tensor in tensors)
        with new_folder(out, need) as aside:
            weights.verify(reporter)
            aside.mkdir(parents=True)
            files, notes = _write_small_files(aside, weights, dtype, found)
            with reporter.stage(f"write {out.name}", need) as advance:
                files += write_shards(aside, [_counted(tensor, advance) for tensor in tensors], shard_bytes)
            size = sum((aside / name).stat().st_size for name in files)
        parameters = budget.parameters(weights.model).total
        return ExportReport(out, architecture, dtype, parameters, tuple(files), size, tuple(notes))


def _theirs(weights: WeightReader, pair: Counterpart, dtype: str) -> Iterator[LazyTensor]:
    for number, name in enumerate(pair.theirs):
        expert = number if pair.per_expert else None
        yield LazyTensor(name, pair.their_shape, dtype, partial(_cast_rows, weights, pair.ours, dtype, expert))


def _cast_rows(weights: WeightReader, name: str, dtype: str, expert: int | None, first: int, count: int) -> Tensor:
    rows = weights.rows(name, first, count, expert)
    cast = rows.to(getattr(torch, dtype))
    if not torch.equal(cast.isfinite(), rows.isfinite()):
        largest = rows[rows.isfinite()].abs().max().item()
        remedy = "export as bfloat16 or float32"
        raise UserError(f"{name} holds {largest:g}", f"values that {dtype} holds", remedy)
    return cast


def _counted(tensor: LazyTensor, advance: Any) -> LazyTensor:
    def rows(first: int, count: int) -> Tensor:
        values = tensor.rows(first, count)
        advance(values.nbytes)
        return values

    return LazyTensor(tensor.name, tensor.shape, tensor.dtype, rows)


def _write_small_files(
    folder: Path, weights: WeightReader, dtype: str, found: FoundTokenizer
) -> tuple[list[str], list[str]]:
    """All but the weights: their names, and notes."""
    files, notes = [CONFIG_FILE, _README], []
    if architecture_of(weights.model) == OWN:
        notes.append(
            f"no stock architecture has {'; '.join(departures(weights.model))}: the weights bear this program's own "
            f"names, and {CONFIG_FILE} its model section. `glam checkpoint import` reads the folder, transformers "
            "does not"
        )
    length = _sequence_length(weights.manifest.document)
    if length is None:
        length = _UNKNOWN_LENGTH
        notes.append(
            f"max_position_embeddings={length} is a guess: the checkpoint does not say how long sequences were"
        )
    eos_id = found.tokenizer.eos_id if found.tokenizer else None
    if found.tokenizer is None:
        notes.append(found.note)
    else:
        exported = export_tokenizer(found.tokenizer, folder, found.texts, length)
        files += exported.files
        notes += exported.notes
        _write_json(folder / "generation_config.json", {"eos_token_id": eos_id})
        files.append("generation_config.json")
    _write_json(folder / CONFIG_FILE, to_huggingface(weights.model, length, eos_id, dtype))
    write_atomically(folder / _README, _readme(weights, dtype, notes, HUGGINGFACE_FILE in files).encode())
    return files, notes


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(tree, indent=2).encode() + b"\n")


def _sequence_length(document: dict[str, Any]) -> int | None:
    """The length of sequences a model was trained on, by its run or by those its weights come from."""
    length = document.get("config", {}).get("train", {}).get("sequence_length")
    for source in document.get("origin", {}).get("sources", []):
        length = length or source.get("sequence_length") or _sequence_length(source)
    return length


def _readme(weights: WeightReader, dtype: str, notes: list[str], has_tokenizer: bool) -> str:
    architecture, source = architecture_of(weights.model), weights.source
    counts = budget.parameters(weights.model)
    made = ", ".join(f"{key} {source[key]}" for key in ("name", "step", "tokens") if key in source)
    lines = [
        f"# {source.get('name') or weights.folder.name}",
        "",
        f"{architecture}, {counts.total:,} parameters, {counts.active:,} active a token, {dtype}. Written by "
        f"`glam checkpoint export`{f' ({made})' if made else ''}.",
    ]
    if architecture != OWN:
        lines += ["", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
        lines += ['model = AutoModelForCausalLM.from_pretrained("PATH", dtype="auto")']
        lines += ['tokenizer = AutoTokenizer.from_pretrained("PATH")'] * has_tokenizer + ["```"]
    if has_tokenizer:
        lines += ["", "Each text of the training data ended with the EOS token; none began with a token of its own."]
    for note in notes:
        lines += ["", f"- {note}."]
    return "\n".join(lines) + "\n"


# ---- in -------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ImportReport:
    """What was read, and written.

    Attributes:
        dtypes: of the weights there, safetensors' names; here they are float32.
        notes: what a user must know, one sentence each.
    """

    folder: Path
    architecture: str
    dtypes: tuple[str, ...]
    parameters: int
    notes: tuple[str, ...]


def import_folder(source: Path, out: Path, reporter: Reporter | None = None) -> ImportReport:
    """Write a checkpoint of weights only, in float32, from a Hugging Face folder of Qwen3 or Qwen3-MoE, or one that
    `export_folder` made; with its `model.yaml`, and its tokenizer's files if it has any.

    Raises:
        UserError: a model that ours cannot be, files or tensors that are missing, damaged or do not fit its
            config.json, or `out` cannot be made.
    """
    reporter = reporter or Reporter(None)
    if not source.is_dir():
        raise UserError(f"{source} is no folder", "a Hugging Face folder", "check the path; nothing is fetched")
    their = from_huggingface(source)
    pairs = counterparts(their.model, their.architecture)
    with Shards(source) as shards:
        notes = _settle_tied_head(shards, their)
        _require_tensors(shards, pairs)
        tensors = [LazyTensor(pair.ours, pair.shape, "float32", partial(_our_rows, shards, pair)) for pair in pairs]
        facts = {
            "huggingface": str(source.absolute()),
            "architecture": their.architecture,
            "dtypes": sorted(shards.dtypes),
            "sequence_length": their.sequence_length,
        }
        write_weights(out, their.model, tensors, Origin("import", facts, source, {}), reporter)
        parameters = budget.parameters(their.model).total
        return ImportReport(out, their.architecture, tuple(sorted(shards.dtypes)), parameters, tuple(notes))


def _our_rows(shards: Shards, pair: Counterpart, first: int, count: int) -> Tensor:
    if not pair.per_expert:
        return shards.rows(pair.theirs[0], first, count)
    if pair.theirs[0] in shards.shapes:
        return torch.stack([shards.rows(name, 0, pair.shape[1]) for name in pair.theirs[first : first + count]])
    stacked = stacked_form(pair)
    return shards.part(stacked.theirs, (first, stacked.first_row, 0), (count, stacked.num_rows, pair.shape[2]))


def _settle_tied_head(shards: Shards, their: TheirModel) -> list[str]:
    """Some writers store tied output weights a second time; more than a copy they must not be."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if not their.model.tied_embedding or head not in shards.shapes or embedding not in shards.shapes:
        return []
    shape = shards.shapes[head]
    same = shape == shards.shapes[embedding] and all(
        torch.equal(shards.rows(head, *run).float(), shards.rows(embedding, *run).float())
        for run in runs_of(shape, "float32")
    )
    if not same:
        raise UserError(
            f"{shards.folder}: tie_word_embeddings=true, and a {head} other than {embedding}",
            "the same weights, or tie_word_embeddings=false",
            "mend config.json to say what the model was trained with",
        )
    del shards.shapes[head]
    return [f"{head} is a copy of the tied {embedding} and was left out"]


def _require_tensors(shards: Shards, pairs: list[Counterpart]) -> None:
    expected: dict[str, tuple[int, ...]] = {}
    for pair in pairs:
        if pair.per_expert and (stacked := stacked_form(pair)).theirs in shards.shapes:
            expected[stacked.theirs] = stacked.shape
        else:
            expected |= dict.fromkeys(pair.theirs, pair.their_shape)
    where, remedy = shards.folder, "fetch the folder again; its config.json and its weights must be of one model"
    if missing := sorted(expected.keys() - shards.shapes.keys()):
        found = f"{where} lacks {len(missing)} tensor(s), such as {missing[0]}"
        raise UserError(found, f"the {len(expected)} tensors of its config.json", remedy)
    if strange := sorted(shards.shapes.keys() - expected.keys()):
        found = f"{where} holds {len(strange)} tensor(s) that ours has no place for, such as {strange[0]}"
        raise UserError(found, f"the {len(expected)} tensors of its config.json", remedy)
    for name, shape in expected.items():
        if shards.shapes[name] != shape:
            found = f"{where}: {name} has the shape {list(shards.shapes[name])}"
            raise UserError(found, f"{list(shape)}, by its config.json", remedy)
