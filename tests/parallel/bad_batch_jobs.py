"""Bad batches made of data: which samples are bad is written in their tokens, so they are bad whenever they are met."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from configs.data import DataConfig
from configs.errors import UserError
from configs.run import RunConfig
from data_prep.format import ShardWriter, TokenStream
from data_prep.manifest import DOCUMENT, write_manifest
from pretrain import loop, rollback
from pretrain.build import build
from pretrain.checkpoint import Checkpoints
from pretrain.data import Source
from slurm.environ import LaunchEnv
from tests.parallel.jobs import pieces

POISON = 0  # the unknown token, which no text of the corpus holds


def poisoned_copy(folder: Path, corpus: Path, samples: Iterable[int], sequence_length: int) -> DataConfig:
    """The corpus's two sources, mixed evenly; in `json`, a copy of the corpus's, the given samples consist of POISON.

    The first token of a window stays, as it is the last label of the window before.
    """
    original = corpus / "train" / "json"
    stream, order = TokenStream(original), Source("json", str(original), sequence_length, 0)
    tokens = stream.read(0, stream.num_tokens)
    assert POISON not in tokens
    for sample in samples:
        start = order.window_of(sample) * sequence_length
        tokens[start + 1 : start + sequence_length] = POISON
    manifest = stream.manifest
    assert manifest is not None
    copy = folder / "train" / "json"
    copy.mkdir(parents=True)
    begin, infos = 0, []
    for number, shard in enumerate(manifest.shards):
        origins = np.fromfile(original / f"{shard.name}.docs", DOCUMENT)
        with ShardWriter(copy, number, manifest.vocab_size) as writer:
            for origin, length in zip(origins, np.diff(stream.documents(number)).tolist()):
                writer.add_document(tokens[begin : begin + length], 0, origin)
                begin += length
            infos.append(writer.close())
    write_manifest(
        copy, name="json", vocab_size=manifest.vocab_size, eos_id=manifest.eos_id, shards=infos,
        tokenizer_sha256=manifest.tokenizer_sha256, tokenizer=os.path.relpath(corpus / "tokenizer", copy),
        sources=stream._source_files,
    )  # fmt: skip
    sources = [{"name": "json", "path": str(copy)}, {"name": "email", "path": str(corpus / "train" / "email")}]
    return DataConfig.check({"sources": sources}, "test")


def bad_batch_job(env: LaunchEnv, config: RunConfig, breaks: bool) -> dict[str, Any]:
    """A whole run by the trainer's own loop; what it came to.

    Args:
        breaks: POISON makes whatever it touches not a number, as a fault of the model at rare input would.
    """
    with build(config, env) as run:
        if breaks:
            run.engine.model.embed.register_forward_hook(_break)
        told: dict[str, Any] = {}
        try:
            told["code"] = loop.train(run)
        except UserError as error:
            told |= {"error": str(error), "cause": error.cause}
        return {**told, "pieces": pieces(run.engine), "state": run.state.to_json()}


def dying_job(env: LaunchEnv, config: RunConfig, where: str) -> None:
    """A run that breaks at POISON, and whose process ends in the midst of its first rollback."""
    drop, write_down = Checkpoints._drop, rollback._write_down

    def dying_drop(self: Checkpoints, folder: Path) -> None:
        if folder.name == "step-00000018":  # a checkpoint of the bad row
            os._exit(9)
        drop(self, folder)

    def dying_write_down(*arguments: Any) -> Any:
        if where == "before the blocklist":
            os._exit(9)
        write_down(*arguments)
        os._exit(9)

    if where == "before the later checkpoints go":
        Checkpoints._drop = dying_drop  # type: ignore[method-assign]
    else:
        rollback._write_down = dying_write_down
    bad_batch_job(env, config, True)


def _break(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return torch.where((inputs[0] == POISON).unsqueeze(-1), torch.nan, output)
