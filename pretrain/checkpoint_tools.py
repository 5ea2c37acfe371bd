"""Checkpoints on one process: verified, and made into new ones that hold weights only.

Nothing is made of bytes that were not compared with their checksums first. Tensors pass through memory in runs of rows.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.base import differences
from configs.errors import UserError
from data_prep.progress import Reporter
from parallel.checkpoint_files import Fault, verify
from parallel.checkpoint_manifest import ITEM_BYTES, MANIFEST, Damaged, Manifest, StoredBox, StoredTensor
from parallel.checkpoint_serial import LazyTensor, WholeReader, write_whole
from pretrain.checkpoint_folders import CHECKPOINTS, complete_checkpoints, find_checkpoint

WEIGHT = "/weight"
UNIT_BYTES = 256 * 2**20  # a thread verifies so many at a time
THREADS = min(8, os.cpu_count() or 1)
_BLOCK = 2**18  # values that are averaged or converted at a time: they stay in a core's cache
_ROOM_FOR_INDEX = 1.02  # heads of files and the manifest, beside the tensors' own bytes


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """A block is too small to share: torch's threads would wait for each other longer than they work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- opening --------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _nothing_of_ours_is_bad_input(folder: Path) -> Iterator[None]:
    """A folder without any trace of a checkpoint was named by mistake; to restore it from a copy is no remedy."""
    try:
        yield
    except Damaged:
        if (folder / MANIFEST).exists() or any(folder.glob("*.safetensors")):
            raise
        found = f"{folder} is no checkpoint and no run that has one"
        raise UserError(found, "a checkpoint folder, or the folder of a run that has saved", "check the path") from None


def open_checkpoint(path: Path) -> WholeReader:
    """The checkpoint that a path means: itself, or the newest of a run.

    Raises:
        UserError: there is none, it is damaged, or was written by another program or version.
    """
    folder = find_checkpoint(path)
    with _nothing_of_ours_is_bad_input(folder):
        return WholeReader(folder)


def checkpoints_at(path: Path) -> list[Path]:
    """All checkpoints of a run, oldest first, or the one that the path is."""
    newest = find_checkpoint(path)
    return complete_checkpoints(path.parent if path.name == CHECKPOINTS else path) or [newest]


def weight_names(manifest: Manifest) -> list[str]:
    return [name for name in manifest.tensors if name.endswith(WEIGHT)]


# ---- verifying ------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Verified:
    """What came of comparing a checkpoint with its checksums.

    Attributes:
        bytes: of all its files; 0 where the manifest cannot be trusted, so that nothing else was read.
    """

    folder: Path
    bytes: int
    faults: tuple[Fault, ...]


def verify_all(path: Path, reporter: Reporter, threads: int = THREADS) -> list[Verified]:
    """Compare every byte of a checkpoint, or of all those of a run, with its checksum.

    Raises:
        UserError: no checkpoint there; or the path is one that another program or version wrote.
    """
    found = []
    for folder in checkpoints_at(path):
        try:
            with _nothing_of_ours_is_bad_input(folder):
                manifest = Manifest.read(folder, sizes=False)
        except UserError as error:
            if folder == path and not isinstance(error, Damaged):
                raise
            found.append(Verified(folder, 0, (Fault("", "", error.found),)))
            continue
        faults = find_faults(folder, manifest, reporter, threads)
        size = (folder / MANIFEST).stat().st_size + sum(file.bytes for file in manifest.files)
        found.append(Verified(folder, size, tuple(faults)))
    return found


def find_faults(
    folder: Path, manifest: Manifest, reporter: Reporter, threads: int = THREADS, names: Collection[str] | None = None
) -> list[Fault]:
    """What is wrong with the files of a checkpoint, or with those parts that hold the tensors `names`."""
    units = list(_units(manifest, names))
    total = sum(_unit_bytes(unit) for unit in units)
    faults: list[Fault] = []
    with reporter.stage(f"verify {folder.name}", total) as advance, ThreadPoolExecutor(threads) as pool:
        for unit, met in zip(units, pool.map(lambda unit: verify(folder, unit), units), strict=True):
            faults += met
            advance(_unit_bytes(unit))
    return list(dict.fromkeys(faults))  # units of one file all read its head


def _units(manifest: Manifest, names: Collection[str] | None) -> Iterator[Manifest]:
    """Cut into manifests of one file and about UNIT_BYTES of its boxes each, for threads to share a large file too."""
    held: dict[int, list[tuple[StoredBox, str]]] = {}
    for name in manifest.tensors if names is None else names:
        for box in manifest.tensors[name].boxes:
            held.setdefault(box.file, []).append((box, name))
    for number, file in enumerate(manifest.files):
        if number not in held and names is not None:
            continue
        unit: dict[str, StoredTensor] = {}
        size = 0
        for box, name in sorted(held.get(number, []), key=lambda pair: pair[0].start):
            tensor = manifest.tensors[name]
            before = unit[name].boxes if name in unit else ()
            unit[name] = StoredTensor(tensor.shape, tensor.dtype, (*before, box._replace(file=0)))
            size += tensor.box_bytes(box)
            if size >= UNIT_BYTES:
                yield Manifest({}, (file,), unit)
                unit, size = {}, 0
        if unit or number not in held:
            yield Manifest({}, (file,), unit)


def _unit_bytes(unit: Manifest) -> int:
    return sum(tensor.box_bytes(box) for tensor in unit.tensors.values() for box in tensor.boxes)


def require_sound(reader: WholeReader, reporter: Reporter) -> None:
    """Before weights are used: refuse a checkpoint whose weights are not as they were written.

    Raises:
        Damaged: naming the first file and tensor.
    """
    names = weight_names(reader.manifest)
    if not names:
        raise UserError(f"{reader.folder} holds no weights", "a checkpoint of a model", "choose another")
    if faults := find_faults(reader.folder, reader.manifest, reporter, names=names):
        more = f" (and {len(faults) - 1} more: glam checkpoint verify lists them)" if len(faults) > 1 else ""
        raise Damaged(
            f"{reader.folder} is damaged: {faults[0]}{more}",
            "bytes as they were written",
            "restore it from a copy, or choose another checkpoint; nothing was written",
        )


# ---- making new ones ------------------------------------------------------------------------------------------------
def convert(path: Path, out: Path, dtype: str, reporter: Reporter) -> Manifest:
    """Write the weights of a checkpoint in another type; returns what was written.

    Raises:
        UserError: the source is damaged, `out` cannot be made, or a value does not fit the type.
    """
    with open_checkpoint(path) as reader:
        document = _document("convert", _model_of(reader), [reader], [{}])

        def rows(name: str, first: int, count: int) -> Tensor:
            return _mean([reader.rows(name, first, count)], [1.0], dtype, name)

        tensors = [LazyTensor(name, shape, dtype, partial(rows, name)) for name, shape in _weights(reader).items()]
        require_new(out, sum(_size(tensor) for tensor in tensors))
        require_sound(reader, reporter)
        return _write(out, tensors, document, reporter)


def newest(path: Path, count: int) -> list[Path]:
    """The newest `count` checkpoints of a run, oldest first.

    Raises:
        UserError: it has fewer.
    """
    found = complete_checkpoints(path.parent if path.name == CHECKPOINTS else path)
    if count < 1 or len(found) < count:
        have = f"{path} holds {len(found)} checkpoint(s)"
        raise UserError(f"--last {count}; {have}", f"from 2 to {max(2, len(found))}", "name a run that has so many")
    return found[-count:]


def average(paths: Sequence[Path], out: Path, shares: Sequence[float] | None, reporter: Reporter) -> Manifest:
    """Write the weighted mean of the weights of several checkpoints of one model; returns what was written.

    Args:
        shares: one for each path, together about 1; they are scaled to be 1 exactly. None: equal ones.

    Raises:
        UserError: fewer than two, other models, shares that do not fit, damage, or `out` cannot be made.
    """
    if len(paths) < 2:
        raise UserError(f"{len(paths)} checkpoint to average", "two or more", "name more, or one run with --last K")
    scaled = _scaled(shares if shares is not None else [1 / len(paths)] * len(paths), len(paths))
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(open_checkpoint(path)) for path in paths]
        document = _document("average", _one_model(readers), readers, [{"share": share} for share in scaled])
        shapes = _weights(readers[0])
        types = {name: _widest([reader.manifest.tensors[name].dtype for reader in readers]) for name in shapes}

        def rows(name: str, first: int, count: int) -> Tensor:
            step = max(1, count // len(readers))  # so that those of all sources are no more than one run
            runs = [(start, min(step, first + count - start)) for start in range(first, first + count, step)]
            means = [_mean([r.rows(name, *run) for r in readers], scaled, types[name], name) for run in runs]
            return torch.cat(means) if len(means) > 1 else means[0]

        tensors = [LazyTensor(name, shape, types[name], partial(rows, name)) for name, shape in shapes.items()]
        require_new(out, sum(_size(tensor) for tensor in tensors))
        for reader in {reader.folder: reader for reader in readers}.values():
            require_sound(reader, reporter)
        return _write(out, tensors, document, reporter)


def _write(out: Path, tensors: list[LazyTensor], document: dict[str, Any], reporter: Reporter) -> Manifest:
    total = sum(_size(tensor) for tensor in tensors)
    with one_thread(), reporter.stage(f"write {out.name}", total) as advance:

        def counted(tensor: LazyTensor, first: int, count: int) -> Tensor:
            values = tensor.rows(first, count)
            advance(values.nbytes)
            return values

        return write_whole(out, [replace(tensor, rows=partial(counted, tensor)) for tensor in tensors], document)


def require_new(out: Path, need: int) -> None:
    """Refuse a place where a new checkpoint cannot be, before anything is read for it.

    Args:
        need: bytes of its tensors.
    """
    if os.path.lexists(out):
        raise UserError(f"{out} exists", "a new folder", "choose another --to, or move it away")
    if out.absolute().parent.name == CHECKPOINTS:
        found = f"--to {out}, among the checkpoints of a run"
        raise UserError(found, "a folder of its own: a run cannot go on from weights alone", "choose another --to")
    there = next(path for path in out.absolute().parents if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK):
        found = f"{there} {'is no folder' if not there.is_dir() else 'cannot be written'}"
        raise UserError(found, f"a folder that can be written, for {out}", "choose another --to")
    free, need = shutil.disk_usage(there).free, round(need * _ROOM_FOR_INDEX) + 2**16
    if need > free:
        found = f"no room for {out}: {free / 2**30:.2f} GiB free"
        raise UserError(found, f"{need / 2**30:.2f} GiB", "free space, or choose another disk with --to")


def _size(tensor: LazyTensor) -> int:
    return math.prod(tensor.shape) * ITEM_BYTES[tensor.dtype]


def _weights(reader: WholeReader) -> dict[str, tuple[int, ...]]:
    return {name: reader.manifest.tensors[name].shape for name in weight_names(reader.manifest)}


def _model_of(reader: WholeReader) -> dict[str, Any]:
    model: dict[str, Any] | None = reader.manifest.document.get("config", {}).get("model")
    if not model:
        found = f"{reader.folder} does not say which model it holds"
        raise UserError(found, "a checkpoint of a run, or one made by `glam checkpoint`", "choose another")
    return model


def _one_model(readers: Sequence[WholeReader]) -> dict[str, Any]:
    """The model that all hold, or a UserError naming what differs."""
    first, model = readers[0], _model_of(readers[0])
    shapes = _weights(first)
    for other in readers[1:]:
        pair = f"{first.folder} and {other.folder}"
        if differ := differences(model, _model_of(other), "model"):
            shown = "; ".join(f"{key} is {a!r} and {b!r}" for key, a, b in differ[:5])
            raise UserError(f"{pair} hold different models: {shown}", "checkpoints of one model", "leave one out")
        theirs = _weights(other)
        if shapes != theirs:
            name = min(name for name in shapes.keys() | theirs.keys() if shapes.get(name) != theirs.get(name))
            found = f"{pair} differ in {name}: {shapes.get(name, 'absent')} and {theirs.get(name, 'absent')}"
            raise UserError(found, "the same weights in all", "leave one out")
        known = [set(filter(None, _tokenizers([reader]).values())) for reader in (first, other)]
        if all(known) and not known[0] & known[1]:
            found = f"{pair} were trained with different tokenizers"
            raise UserError(found, "one tokenizer: token ids would mean other text", "leave one out")
    return model


def _tokenizers(readers: Sequence[WholeReader]) -> dict[str, str | None]:
    """sha256 of the tokenizer of each data source."""
    return {key: value for r in readers for key, value in r.manifest.document.get("tokenizers", {}).items()}


def _scaled(shares: Sequence[float], count: int) -> list[float]:
    """Shares that sum to 1."""
    given = ",".join(f"{share:g}" for share in shares)
    if len(shares) != count:
        raise UserError(f"--shares {given} for {count} checkpoints", "one share for each", "add or leave out some")
    if not all(0 < share < math.inf for share in shares):
        raise UserError(f"--shares {given}", "each above 0", "leave out checkpoints that should not count")
    if abs(sum(shares) - 1) > 0.01:
        raise UserError(f"--shares {given}, together {sum(shares):g}", "shares that sum to 1", "scale them")
    return [share / sum(shares) for share in shares]


def _widest(dtypes: Sequence[str]) -> str:
    widest = getattr(torch, dtypes[0])
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, getattr(torch, dtype))
    return str(widest).removeprefix("torch.")


def _mean(parts: Sequence[Tensor], shares: Sequence[float], dtype: str, name: str) -> Tensor:
    """Weighted sum of tensors of one shape, in another type.

    In float64, which holds products and sums of float32 so well that the mean of equal values is that value.
    """
    wanted = getattr(torch, dtype)
    if len(parts) == 1 and parts[0].dtype == wanted:
        return parts[0]
    made = torch.empty(parts[0].shape, dtype=wanted)
    flat = [part.reshape(-1).split(_BLOCK) for part in parts]
    for number, target_N in enumerate(made.view(-1).split(_BLOCK)):
        total_N = flat[0][number].double().mul_(shares[0])
        for blocks, share in zip(flat[1:], shares[1:], strict=True):
            total_N.add_(blocks[number], alpha=share)
        target_N.copy_(total_N)
        if not _is_finite(target_N) and not torch.equal(total_N.isfinite(), target_N.isfinite()):
            largest = total_N[total_N.isfinite()].abs().max().item()
            remedy = "choose another --dtype: bfloat16 reaches as far as float32"
            raise UserError(f"{name} holds {largest:g}", f"at most {torch.finfo(wanted).max:g} in {dtype}", remedy)
    return made


def _is_finite(values_N: Tensor) -> bool:
    """Several times quicker than to ask `isfinite` of each."""
    return all(math.isfinite(bound) for bound in torch.stack(values_N.aminmax()).tolist())


def _source(reader: WholeReader) -> dict[str, Any]:
    """Where weights come from, as the document of what is made of them keeps it."""
    document = reader.manifest.document
    state = document.get("state", {})
    found = {"checkpoint": str(reader.folder.absolute()), "name": document.get("config", {}).get("name")}
    found |= {"step": state.get("step"), "tokens": state.get("tokens"), "origin": document.get("origin")}
    return {key: value for key, value in found.items() if value is not None}


def _document(
    verb: str, model: dict[str, Any], readers: Sequence[WholeReader], notes: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Of a checkpoint of weights only. Each source has a note of its own."""
    sources = [{**_source(reader), **note} for reader, note in zip(readers, notes, strict=True)]
    origin = {"verb": f"checkpoint {verb}", "time": time.time(), "torch": str(torch.__version__), "sources": sources}
    return {"config": {"model": model}, "tokenizers": _tokenizers(readers), "origin": origin}
