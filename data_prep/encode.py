"""Texts to tokens on several processes, results in the order of the texts whatever their number."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from configs.errors import UserError
from data_prep.format import token_dtype
from data_prep.tokenizer import Tokenizer

_BATCHES_A_WORKER = 3  # one in work, one waiting, one on its way: bounds memory, keeps workers busy


@dataclass(frozen=True)
class EncodedBatch:
    """Tokens of some documents, EOS included: ids [sum of lengths], lengths int64 [documents]."""

    ids: npt.NDArray[np.integer[Any]]
    lengths: npt.NDArray[np.int64]


def encode_batch(tokenizer: Tokenizer, texts: list[str]) -> EncodedBatch:
    """Encode documents one after the other, each with EOS behind it."""
    eos = np.array([tokenizer.eos_id], np.int32)
    parts = [part for text in texts for part in (tokenizer.encode(text), eos)]
    lengths = np.array([part.size + 1 for part in parts[::2]], np.int64)
    return EncodedBatch(np.concatenate(parts).astype(token_dtype(tokenizer.vocab_size)), lengths)


def encode_batches(folder: Path, batches: Iterable[list[str]], workers: int) -> Iterator[EncodedBatch]:
    """Encode batches with the tokenizer in ``folder``; with one worker in this process.

    Raises:
        UserError: a worker process was killed.
    """
    if workers == 1:
        tokenizer = Tokenizer(folder)
        yield from (encode_batch(tokenizer, texts) for texts in batches)
        return
    # Spawn: forking a process that has threads (a progress display, a BLAS) may deadlock.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent)
    waiting: deque[Future[EncodedBatch]] = deque()
    try:
        for texts in batches:
            waiting.append(pool.submit(_encode_in_worker, str(folder), texts))
            if len(waiting) >= workers * _BATCHES_A_WORKER:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise UserError(
            "a tokenizing process died",
            f"{workers} processes with memory for a few documents each",
            "set workers=1, or give more memory",
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _end_with_parent() -> None:
    """A parent that is killed cannot stop its pool, whose processes would wait for work for ever."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _encode_in_worker(folder: str, texts: list[str]) -> EncodedBatch:
    return encode_batch(_worker_tokenizer(folder), texts)


@lru_cache(maxsize=1)  # once for each worker process, which lives for one corpus
def _worker_tokenizer(folder: str) -> Tokenizer:
    return Tokenizer(folder)
