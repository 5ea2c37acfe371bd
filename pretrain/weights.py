"""Weights that come from, or go to, other places than a run: what importing, exporting and upcycling share."""

from __future__ import annotations

import shutil
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from configs.model import ModelConfig
from data_prep.progress import Reporter
from data_prep.storage import write_atomically
from data_prep.tokenizer_files import HUGGINGFACE_FILE, HUGGINGFACE_SETTINGS, SENTENCEPIECE_FILE
from model.glam import GLaM
from parallel.checkpoint_files import BoxReader
from parallel.checkpoint_manifest import Manifest
from parallel.checkpoint_serial import LazyTensor, WholeReader, write_whole
from parallel.checkpoint_store import read_boxes
from parallel.checkpoint_write import sync_folder, write_refused
from pretrain.checkpoint_tools import WEIGHT, open_checkpoint, require_new, require_sound

MODEL_FILE = "model.yaml"
TOKENIZER_FILES = (SENTENCEPIECE_FILE, HUGGINGFACE_FILE, HUGGINGFACE_SETTINGS)


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of a model, in its order."""
    with torch.device("meta"):
        return {name: tuple(p.shape) for name, p in GLaM(model).named_parameters()}


class WeightReader:
    """The weights of a checkpoint by parameter, all of them there."""

    def __init__(self, whole: WholeReader, model: ModelConfig, boxes: BoxReader) -> None:
        self.folder, self.manifest, self.model = whole.folder, whole.manifest, model
        self._whole, self._boxes = whole, boxes

    def verify(self, reporter: Reporter) -> None:
        """Compare all weights with their checksums: before any is used, and after cheaper reasons to refuse.

        Raises:
            UserError: they are not as they were written.
        """
        require_sound(self._whole, reporter)

    def rows(self, name: str, first: int, count: int, expert: int | None = None) -> Tensor:
        """Rows [first, first + count) of a parameter, or of one expert of a stack, as stored."""
        stored = self.manifest.tensors[name + WEIGHT]
        lead = () if expert is None else (1,)
        inner = stored.shape[1 + len(lead) :]
        target = torch.empty((*lead, count, *inner), dtype=getattr(torch, stored.dtype))
        offset = (*([] if expert is None else [expert]), first, *([0] * len(inner)))
        read_boxes(self._boxes, name + WEIGHT, stored, [(offset, target)])
        return target if expert is None else target[0]

    @property
    def source(self) -> dict[str, Any]:
        """Where these weights come from, for the document of what is made of them."""
        document = self.manifest.document
        config, state = document.get("config", {}), document.get("state", {})
        found = {
            "checkpoint": str(self.folder.absolute()),
            "name": config.get("name"),
            "sequence_length": config.get("train", {}).get("sequence_length"),
            "step": state.get("step"),
            "tokens": state.get("tokens"),
            "origin": document.get("origin"),
        }
        return {key: value for key, value in found.items() if value is not None}


@contextmanager
def open_weights(path: Path) -> Iterator[WeightReader]:
    """The weights of a checkpoint, or of the newest of a run, not yet verified.

    Raises:
        UserError: no checkpoint, or one that does not hold the model it speaks of.
    """
    with open_checkpoint(path) as whole:
        tree = whole.manifest.document.get("config", {}).get("model")
        if not tree:
            found = f"{whole.folder} does not say which model it holds"
            raise UserError(found, "a checkpoint of a run, or one made by `glam checkpoint`", "choose another")
        model = ModelConfig.check(tree, where=f"the model of {whole.folder}")
        _require_complete(whole, model)
        with BoxReader(whole.folder, whole.manifest) as boxes:
            yield WeightReader(whole, model, boxes)


def _require_complete(whole: WholeReader, model: ModelConfig) -> None:
    expected = parameter_shapes(model)
    stored = {
        name.removesuffix(WEIGHT): tensor.shape
        for name, tensor in whole.manifest.tensors.items()
        if name.endswith(WEIGHT)
    }
    if stored != expected:
        name = min(n for n in stored.keys() | expected.keys() if stored.get(n) != expected.get(n))
        raise UserError(
            f"{whole.folder} holds {_shape(stored.get(name))} for {name}",
            f"{_shape(expected.get(name))}, as its own configuration says",
            "choose another checkpoint",
        )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else str(list(shape))


@contextmanager
def new_folder(out: Path, need: int) -> Iterator[Path]:
    """A name beside `out` to make a folder at. It becomes `out` when the block ends well; else nothing is left.

    Args:
        need: bytes that will be written.

    Raises:
        UserError: something stands at `out` already, or the disk refuses.
    """
    require_new(out, need)
    aside = out.with_name(f"{out.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        yield aside
        sync_folder(aside)
        aside.rename(out)
        sync_folder(out.absolute().parent)
    except OSError as error:
        raise write_refused(error, out) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@dataclass(frozen=True)
class Origin:
    """What weights are made from.

    Attributes:
        verb: of `glam checkpoint`.
        source: what the new checkpoint says of it.
        folder: tokenizer files in it go along.
        tokenizers: sha256 of that of each data source, where known.
        verify: refuses what is damaged; called before the first tensor is read.
    """

    verb: str
    source: dict[str, Any]
    folder: Path
    tokenizers: dict[str, Any]
    verify: Callable[[], None] = lambda: None


def write_weights(
    out: Path, model: ModelConfig, tensors: Sequence[LazyTensor], origin: Origin, reporter: Reporter
) -> Manifest:
    """A new checkpoint of weights only, in float32, with its `model.yaml`; whole or not at all.

    Args:
        tensors: of the model's parameters, by their names.
    """
    made = {"verb": f"checkpoint {origin.verb}", "time": time.time(), "torch": str(torch.__version__)}
    document = {
        "config": {"model": model.model_dump(mode="json")},
        "tokenizers": origin.tokenizers,
        "origin": {**made, "sources": [origin.source]},
    }
    need = sum(num_values(tensor.shape) * 4 for tensor in tensors)
    with new_folder(out, need) as aside:
        origin.verify()
        with reporter.stage(f"write {out.name}", need) as advance:
            manifest = write_whole(aside, [_stored(tensor, advance) for tensor in tensors], document)
        write_atomically(aside / MODEL_FILE, model_yaml(model, out).encode())
        for name in TOKENIZER_FILES:
            if (origin.folder / name).is_file():
                write_atomically(aside / name, (origin.folder / name).read_bytes())
        return manifest


def _stored(tensor: LazyTensor, advance: Callable[[int], None]) -> LazyTensor:
    """A parameter as a checkpoint keeps it."""

    def rows(first: int, count: int) -> Tensor:
        values = tensor.rows(first, count).float()
        advance(values.nbytes)
        return values

    return LazyTensor(tensor.name + WEIGHT, tensor.shape, "float32", rows)


def num_values(shape: Sequence[int]) -> int:
    return int(torch.Size(shape).numel())


def model_yaml(model: ModelConfig, out: Path) -> str:
    """The section `model:` of a configuration that begins with these weights."""
    head = f"# The model of the weights in {out}: paste it into a configuration, with train.start_from={out}\n"
    return f"{head}model:\n{textwrap.indent(model.dump(), '  ')}"
