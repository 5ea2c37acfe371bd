"""The tokenizer gives back what it was given, and knows how many bytes each token stands for."""

from __future__ import annotations

import io
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.corpus import SentencePieceFile, SentencePieceTraining
from configs.errors import UserError
from data_prep.sampling import BlockSample, cut_blocks
from data_prep.tokenizer import Tokenizer, make_tokenizer, train_model

STDLIB = Path(sysconfig.get_path("stdlib"))
SOURCES = [path.read_text(encoding="utf-8") for path in sorted((STDLIB / "email").glob("*.py"))]
LINES = [line for text in SOURCES for line in text.split("\n") if line]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    spec = SentencePieceTraining(algorithm=request.param, vocab_size=600)
    return make_tokenizer(spec, LINES, tmp_path_factory.mktemp("tokenizer"))


def check(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.token_bytes()[ids].sum()) == len(text.encode())
    assert tokenizer.eos_id not in ids


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("ab \t\n\r_(é漢😀\u2581\x00\ufeff<s>/"), max_size=40) | st.text(max_size=40))
def test_any_text_comes_back(tokenizer: Tokenizer, text: str) -> None:
    check(tokenizer, text)


def test_sources_come_back_and_shrink(tokenizer: Tokenizer) -> None:
    for text in [*SOURCES, (STDLIB / "json" / "decoder.py").read_text(encoding="utf-8"), "</s><unk><0x41>", ""]:
        check(tokenizer, text)
    text = "".join(SOURCES)
    assert len(text.encode()) / tokenizer.encode(text).size > 1.8
    assert tokenizer.lossless
    assert tokenizer.decode(np.array([*tokenizer.encode("a\n"), tokenizer.eos_id])) == "a\n"


def test_the_same_lines_make_the_same_bytes() -> None:
    spec = SentencePieceTraining(vocab_size=600)
    assert train_model(spec, LINES) == train_model(spec, LINES)


@pytest.mark.parametrize(("vocab_size", "lines"), [(50_000, LINES), (261, LINES), (400, []), (400, ["\x00"])])
def test_a_vocabulary_that_does_not_fit_is_the_users_error(vocab_size: int, lines: list[str]) -> None:
    with pytest.raises(UserError, match=f"tokenizer.vocab_size={vocab_size} does not fit"):
        train_model(SentencePieceTraining(vocab_size=vocab_size), lines)


def test_an_existing_model_is_copied(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "theirs.model").write_bytes(train_model(SentencePieceTraining(vocab_size=600), LINES))
    copy = make_tokenizer(SentencePieceFile(path=str(tmp_path / "theirs.model")), [], tmp_path / "folder")
    assert copy.sha256 == Tokenizer(tmp_path / "theirs.model").sha256
    np.testing.assert_array_equal(np.load(tmp_path / "folder" / "token_bytes.npy"), copy.token_bytes())


def test_unfit_models_are_refused_and_lossy_ones_known(tmp_path: Path) -> None:
    path = tmp_path / "m.model"
    with pytest.raises(UserError, match="no such file"):
        Tokenizer(path)
    path.write_bytes(b"no model")
    with pytest.raises(UserError, match="a SentencePiece model"):
        Tokenizer(path)
    for eos_id, name in ((-1, "no_eos"), (2, "lossy")):
        model = io.BytesIO()
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES), model_writer=model, vocab_size=400, eos_id=eos_id, minloglevel=2
        )
        (tmp_path / name).write_bytes(model.getvalue())
    with pytest.raises(UserError, match="no end-of-text piece"):
        Tokenizer(tmp_path / "no_eos")
    assert not Tokenizer(tmp_path / "lossy").lossless


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("a\né漢😀"), max_size=60), block_bytes=st.integers(4, 20))
def test_blocks_are_whole_characters_and_the_whole_text(text: str, block_bytes: int) -> None:
    data = text.encode()
    pieces = [data[start:stop] for start, stop in cut_blocks(data, block_bytes)]
    assert b"".join(pieces) == data
    assert all(piece.decode() and len(piece) <= block_bytes for piece in pieces)


def test_the_sample_keeps_its_budget_covers_the_corpus_and_ignores_order() -> None:
    documents = [(bytes([n, 7]), f"{n:03d} line\n".encode() * 400) for n in range(200)]

    def draw(order: list[tuple[bytes, bytes]], budget: int) -> list[str]:
        sample = BlockSample(budget)
        for digest, data in order:
            sample.offer(digest, data)
        return list(sample.lines())

    lines = draw(documents, 64_000)
    assert lines == draw(documents[::-1], 64_000)
    assert 0.9 * 64_000 < sum(len(line) + 1 for line in lines) <= 64_000
    origins = sorted({int(line[:3]) for line in lines if len(line) == 8})
    assert len(origins) > 40 and origins[0] < 20 and origins[-1] > 180
    assert len(draw(documents, 10**9)) == 200 * 400
