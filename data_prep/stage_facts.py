"""What `glam prep` says of its stages: to itself, what decides their outcome; to a person, what they found."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from configs.corpus import CorpusConfig
from data_prep.stages import Counts
from data_prep.summary import make_table

_WIDEST = 8  # columns of a table


def stage_keys(config: CorpusConfig, made_from: dict[str, str]) -> dict[str, dict[str, Any]]:
    """What decides the outcome of each stage, besides the stages before it.

    Args:
        made_from: hashes of the files read.
    """
    tree, trains = config.model_dump(mode="json"), config.tokenizer.kind == "train_sentencepiece"
    own = ("weight", "filters", "name")
    where = {source["name"]: {k: v for k, v in source.items() if k not in own} for source in tree["sources"]}
    return {
        "read": {
            "sources": where,
            "order of sources": list(where),
            "source files": made_from["source files"],
            "max_document_bytes": config.max_document_bytes,
            "unit_bytes": config.unit_bytes,
        },
        "clean": {
            "clean": {key: value for key, value in tree["clean"].items() if key != "filters"},
            "filters": {
                s.name: [f.model_dump(mode="json") for f in config.filters_of(n)] for n, s in enumerate(config.sources)
            },
            "seed": config.seed,
        },
        "dedup": tree["deduplicate"],
        "quality": {"quality": tree["quality"], "classifier file": made_from.get("classifier file")},
        "tokenizer": {
            "tokenizer": tree["tokenizer"],
            "tokenizer file": made_from.get("tokenizer file"),
            # Of the sample that a new tokenizer is trained on.
            "weights": {source.name: source.weight for source in config.sources if trains},
            "heldout_fraction": config.heldout_fraction,
        },
        "tokenize": {"shard_tokens": config.shard_tokens},
    }


def stage_table(stage: str, counts: Counts) -> Table:
    """For the terminal: what a stage found, by source."""
    flat = {name: _flat(found) for name, found in counts["sources"].items()}
    heads = list(dict.fromkeys(key for found in flat.values() for key in found))
    if len(heads) > _WIDEST:  # many rules: one below the other
        rows = [[key, *(f"{found.get(key, 0):,}" for found in flat.values())] for key in heads]
        return make_table(stage, ["", *flat], rows)
    rows = [[name, *(f"{found.get(key, 0):,}" for key in heads)] for name, found in flat.items()]
    return make_table(stage, ["source", *heads], rows)


def _flat(found: Counts) -> dict[str, int]:
    flat: dict[str, int] = {}
    for key, value in found.items():
        if isinstance(value, dict) and key != "histogram":
            flat |= {name if key == "rules" else f"{key} {name}": n for name, n in value.items() if isinstance(n, int)}
        elif isinstance(value, int):
            flat[key] = value
    return flat
