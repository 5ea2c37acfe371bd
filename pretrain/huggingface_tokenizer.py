"""Which tokenizer goes along with exported weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np

from configs.errors import UserError
from data_prep.format import TokenStream
from data_prep.tokenizer import Tokenizer
from data_prep.tokenizer_export import refuse_larger
from pretrain.weights import TOKENIZER_FILES, WeightReader

_TEXT_TOKENS = 400_000  # of the run's own data, to compare tokenizers on


@dataclass(frozen=True)
class FoundTokenizer:
    """The tokenizer of a model's data, and texts of that data; or why there is none."""

    tokenizer: Tokenizer | None
    texts: tuple[str, ...] = ()
    note: str = ""


def find_tokenizer(weights: WeightReader, given: Path | None) -> FoundTokenizer:
    """The one that is named; else that of the run's data; else one beside the checkpoint.

    Raises:
        UserError: the one that is named is none, or another than the model was trained with.
    """
    if given is not None:
        return FoundTokenizer(_suited(weights, given))
    met = []
    for look in _places(weights):
        try:
            return look()
        except UserError as error:
            met.append(error.found)
    why = met[0] if met else "the checkpoint does not say where its data lies"
    return FoundTokenizer(None, note=f"no tokenizer: {why}; name its folder with --tokenizer")


def _places(weights: WeightReader) -> Iterator[Callable[[], FoundTokenizer]]:
    for source in weights.manifest.document.get("config", {}).get("data", {}).get("sources", []):
        yield partial(_of_data, weights, source["path"])
    if any((weights.folder / name).is_file() for name in TOKENIZER_FILES):
        yield lambda: FoundTokenizer(_suited(weights, weights.folder))


def _of_data(weights: WeightReader, path: str) -> FoundTokenizer:
    stream = TokenStream(path)
    if stream.manifest is None:
        raise UserError(f"{path} does not say which tokenizer made it", "shards made by `glam prep`", "")
    tokenizer = _suited(weights, stream.folder / stream.manifest.tokenizer)
    ids = stream.read(0, min(_TEXT_TOKENS, stream.num_tokens))
    ends = [-1, *np.flatnonzero(ids == stream.eos_id).tolist()]
    return FoundTokenizer(tokenizer, tuple(tokenizer.decode(ids[a + 1 : b]) for a, b in pairwise(ends)))


def _suited(weights: WeightReader, path: Path) -> Tokenizer:
    """The tokenizer there, if it made the model's data."""
    tokenizer = Tokenizer(path)
    known = set(filter(None, weights.manifest.document.get("tokenizers", {}).values()))
    if known and tokenizer.sha256 not in known:
        raise UserError(
            f"{tokenizer.source_file} (sha256 {tokenizer.sha256[:12]}...) did not make the data of {weights.folder} "
            f"({', '.join(digest[:12] for digest in sorted(known))}...)",
            "the tokenizer the model was trained with",
            "name the folder of that one with --tokenizer",
        )
    refuse_larger(tokenizer, weights.model.vocab_size)
    return tokenizer
