"""Ways of turning JSON lines into tokens on disk: ours and others', each a `step` that does all of it once."""

from __future__ import annotations

import importlib.util
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.data_prep_corpus import corpus_config
from data_prep import tokenizing
from data_prep.documents import Job, load_unit
from data_prep.manifest import token_dtype
from data_prep.pipeline import prepare
from data_prep.tokenizer import Tokenizer


class Ours:
    """The tasks of the tokenize stage, as its workers run them, in this process."""

    name = "ours"
    unfit = None

    def __init__(self, lines: Path, folder: Path, algorithm: str, vocab_size: int) -> None:
        self.lines, self.algorithm = lines, algorithm
        self.config = corpus_config(lines, folder / "ours", algorithm, vocab_size, 1)
        prepare(self.config, until="tokenizer")
        work = Path(self.config.output) / "work"
        self.tokenizer_folder, self.folder = work / "tokenizer" / "files", work / "tokenize"
        names = sorted((work / "read").glob("*.unit.json"))
        units = [load_unit(work, number) for number in range(len(names))]
        self.jobs = [Job(self.config, work, unit, ("clean", "dedup")) for unit in units]
        self.tokenizer = Tokenizer(self.tokenizer_folder)
        self.texts: list[str] = [json.loads(line)["text"] for line in lines.open("rb")]
        self.text_bytes = sum(len(text.encode()) for text in self.texts)
        self.dtype = token_dtype(self.tokenizer.vocab_size)

    def step(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for job in self.jobs:
            tokenizing.encode_task(job, self.tokenizer_folder)
        units = [job.unit.name for job in self.jobs]
        for side in tokenizing.SIDES:
            cuts = tokenizing.plan_task(self.folder, units, side, self.config.shard_tokens)["cuts"]
            target = self.folder / "datasets" / side
            target.mkdir(parents=True)
            for index, cut in enumerate(pairwise(cuts)):
                tokenizing.shard_task(self.folder, units, side, index, cut, self.tokenizer_folder, target)

    def note(self) -> str:
        return "shuffled shards, checksums, origins"


class Raw:
    """The tokenizer alone, on texts in memory: the limit."""

    name = "tokenizer alone"
    unfit = None

    def __init__(self, ours: Ours) -> None:
        import sentencepiece

        self._texts = ours.texts
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(ours.tokenizer_folder / "tokenizer.model"))

    def step(self) -> None:
        for text in self._texts:
            self._model.encode_as_numpy(text)

    def note(self) -> str:
        return ""


class Megatron:
    """Megatron-LM's tools/preprocess_data.py, its loop: json.loads, ids as a list, IndexedDatasetBuilder."""

    name = "Megatron-LM's way"

    def __init__(self, ours: Ours) -> None:
        self.unfit = None if importlib.util.find_spec("megatron") else "pip install megatron-core"
        self._ours, self._prefix = ours, ours.folder.parent / "megatron"

    def step(self) -> None:
        import sentencepiece
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        ours = self._ours
        model = sentencepiece.SentencePieceProcessor(model_file=str(ours.tokenizer_folder / "tokenizer.model"))
        builder = IndexedDatasetBuilder(f"{self._prefix}.bin", dtype=ours.dtype.type)
        with ours.lines.open(encoding="utf-8") as file:
            for line in file:
                ids = model.encode(json.loads(line)["text"])
                ids.append(ours.tokenizer.eos_id)
                builder.add_document(ids, [len(ids)])
        builder.finalize(f"{self._prefix}.idx")

    def note(self) -> str:
        return "not shuffled, no checksums"


class DataTrove:
    """datatrove's JsonlReader and DocumentTokenizer, with the same pieces as a Hugging Face tokenizer."""

    name = "datatrove"

    def __init__(self, ours: Ours) -> None:
        self.unfit = None if importlib.util.find_spec("datatrove") else "pip install datatrove orjson"
        if ours.algorithm != "unigram":
            self.unfit = "its pieces of SentencePiece's BPE have no Hugging Face file"
        self._ours, self._folder, self._same = ours, ours.folder.parent / "datatrove", 0.0
        if self.unfit is None:
            from loguru import logger

            logger.disable("datatrove")
            self._file = _as_hugging_face(ours.tokenizer_folder / "tokenizer.model", ours.folder.parent / "hf.json")

    def step(self) -> None:
        from datatrove.pipeline.readers import JsonlReader
        from datatrove.pipeline.tokens import DocumentTokenizer

        shutil.rmtree(self._folder, ignore_errors=True)
        reader = JsonlReader(str(self._ours.lines.parent), glob_pattern=self._ours.lines.name)
        step = DocumentTokenizer(str(self._folder), str(self._file), eos_token="</s>", shuffle_documents=True, seed=0)
        for _ in step.run(reader.run(), rank=0, world_size=1) or ():
            pass

    def note(self) -> str:
        import tokenizers

        model = tokenizers.Tokenizer.from_file(str(self._file))
        texts = self._ours.texts[:: max(1, len(self._ours.texts) // 200)]
        pairs = [(model.encode(t, add_special_tokens=False).ids, self._ours.tokenizer.encode(t)) for t in texts]
        same = sum(np.array_equal(theirs, ids) for theirs, ids in pairs)
        return f"same ids in {same} of {len(texts)} documents"


def _as_hugging_face(model: Path, path: Path) -> Path:
    """A SentencePiece unigram model as a tokenizer.json."""
    import sentencepiece
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    source: Any = sentencepiece.SentencePieceProcessor(model_file=str(model))
    pieces = [(source.id_to_piece(n), source.get_score(n)) for n in range(source.vocab_size())]
    made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=source.unk_id(), byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    made.decoder = decoders.Metaspace(prepend_scheme="never", split=False)
    made.save(str(path))
    return path
