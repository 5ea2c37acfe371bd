"""Whether a checkpoint suits a run: its model, its tokenizer. Files are not read here, only the manifest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from configs.base import differences
from configs.errors import UserError
from configs.model import ModelConfig
from parallel.checkpoint_manifest import Damaged, Manifest
from pretrain.checkpoint_folders import complete_checkpoints

# Settings that a new run may change when it begins from the weights of another: they name no weight and reshape none.
_FREE_TO_CHANGE = (
    "model.attention.position.base", "model.attention.sparse", "model.attention.document_end", "model.moe.router.",
    "model.lm_z_coef",
)  # fmt: skip


def read_for_model(folder: Path, model: ModelConfig, sizes: bool = True) -> Manifest:
    """The manifest, if the checkpoint holds this very model; else a UserError naming what differs.

    Args:
        sizes: as for `Manifest.read`.
    """
    manifest = Manifest.read(folder, sizes)
    if differ := _differences(manifest, model):
        raise _other_model(
            folder,
            differ,
            "restore these keys, choose another run_dir=... for the new model, or begin it from these weights with "
            "train.start_from=...",
        )
    return manifest


def read_for_run(folder: Path, model: ModelConfig, tokenizers: Mapping[str, str | None]) -> Manifest:
    """As `read_for_model`, without looking at files; and the data must have been made by the tokenizer that the run
    began with.

    Args:
        tokenizers: sha256 of each data source's; None where a source made elsewhere does not say.
    """
    manifest = read_for_model(folder, model, sizes=False)  # a thousand ranks, each asking for as many sizes
    before = set(filter(None, manifest.document.get("tokenizers", {}).values()))
    for source, now in tokenizers.items():
        if now and before and now not in before:
            known = ", ".join(digest[:12] for digest in sorted(before))
            raise UserError(
                f"data source {source!r} was made by another tokenizer (sha256 {now[:12]}...) than {folder} was "
                f"trained with ({known}...)",
                "one tokenizer for a model's whole life: token ids would mean other text",
                "prepare the data with that tokenizer (kind: sentencepiece_file or huggingface_file), or choose "
                "another run_dir=... for a new model",
            )
    return manifest


def read_for_start(folder: Path, model: ModelConfig, parameters: Iterable[str]) -> Manifest:
    """The manifest of a checkpoint whose weights a new run of this model can begin with; no files are looked at.

    Args:
        parameters: the names of all the model's.
    """
    manifest = Manifest.read(folder, sizes=False)
    differ = [d for d in _differences(manifest, model) if not d[0].startswith(_FREE_TO_CHANGE)]
    if differ:
        raise _other_model(folder, differ, "mend these keys, or choose other weights for train.start_from")
    stored = {name.removesuffix("/weight") for name in manifest.tensors if name.endswith("/weight")}
    if unmatched := sorted(stored ^ set(parameters)):
        raise UserError(
            f"train.start_from: {folder} and the model differ in {len(unmatched)} parameter(s), such as {unmatched[0]}",
            "the same parameters in both",
            "choose weights of the model that is configured",
        )
    return manifest


def weights_only(manifest: Manifest) -> Manifest:
    """Of the tensors, the weights."""
    return replace(manifest, tensors={name: t for name, t in manifest.tensors.items() if name.endswith("/weight")})


def read_newest_readable(run_dir: Path, model: ModelConfig, tokenizers: Mapping[str, str | None]) -> None:
    """Before ranks meet: refuse a run whose newest readable checkpoint does not suit it. Damage is for `restore`."""
    for folder in complete_checkpoints(run_dir)[::-1]:
        try:
            read_for_run(folder, model, tokenizers)
            return
        except Damaged:
            continue


def no_sound_checkpoint(folder: Path, damaged: Mapping[Path, list[str]]) -> UserError:
    """All checkpoints of a run are damaged: it must not silently begin anew."""
    told = "; ".join(f"{path.name}: {faults[0]}" for path, faults in damaged.items())
    return UserError(
        f"every checkpoint in {folder} is damaged: {told}",
        "at least one that is as it was written",
        f"restore one from a copy, or move {folder} away to begin anew; nothing was changed",
    )


def _differences(manifest: Manifest, model: ModelConfig) -> list[tuple[str, Any, Any]]:
    stored = manifest.document.get("config", {}).get("model")
    return differences(stored or {}, model.model_dump(mode="json"), "model")


def _other_model(folder: Path, differ: list[tuple[str, Any, Any]], remedy: str) -> UserError:
    shown = "; ".join(f"{key} is {a!r} there, {b!r} here" for key, a, b in differ[:5])
    return UserError(f"{folder} holds another model: {shown}", "a checkpoint of the model that is configured", remedy)
