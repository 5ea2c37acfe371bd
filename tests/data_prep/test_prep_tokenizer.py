"""The tokenizer gives back what it was given, and knows how many bytes each token stands for."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from configs.errors import UserError
from configs.tokenizers import HuggingFaceFile, SentencePieceFile, SentencePieceTraining
from data_prep.sampling import cut_blocks
from data_prep.tokenizer import Tokenizer, make_tokenizer, open_source, train_model

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


TEXTS = st.text(st.sampled_from("ab \t\n\r_(é漢😀\u2581\x00\ufeff<s>/"), max_size=40) | st.text(max_size=40)


@settings(max_examples=60, deadline=None)
@given(text=TEXTS)
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


TRAINED = """
import hashlib, os, sys
from pathlib import Path
from configs.tokenizers import SentencePieceTraining
from data_prep.tokenizer import train_model
os.sched_setaffinity(0, list(os.sched_getaffinity(0))[:int(sys.argv[1])])
lines = Path(sys.argv[2]).read_text(encoding="utf-8").split("\\n")
print(hashlib.sha256(train_model(SentencePieceTraining(algorithm=sys.argv[3], vocab_size=900), lines)).hexdigest())
"""


@pytest.mark.parametrize("algorithm", ["bpe", "unigram"])
def test_the_number_of_cores_makes_no_difference(algorithm: str, tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("\n".join(LINES), encoding="utf-8")
    digests = {
        subprocess.run(
            [sys.executable, "-c", TRAINED, cores, str(tmp_path / "lines"), algorithm],
            cwd=Path(__file__).parents[2], env={**os.environ, "OMP_NUM_THREADS": threads},
            capture_output=True, text=True, timeout=120, check=True,
        ).stdout
        for cores, threads in (("1", "1"), ("64", "3"))
    }  # fmt: skip
    assert len(digests) == 1 and len(digests.pop()) == 65


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


BYTE_LEVEL_SPECIALS = ["<s>", "<|endoftext|>", "<pad>"]


def byte_level(specials: list[str], vocab_size: int = 600) -> tokenizers.Tokenizer:
    """GPT-2's kind: any text is bytes, each byte a printable character of its own."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(SOURCES, trainer)
    return made


def metaspace(byte_fallback: bool = True) -> tokenizers.Tokenizer:
    """T5's and Llama's kind; its model knows the special tokens as ordinary pieces."""
    pieces = [
        ("<unk>", 0.0),
        ("</s>", 0.0),
        ("\u2581", -4.0),
        ("\u2581two", -5.0),
        *((c, -6.0) for c in "abcdotwxs/<>"),
    ]
    pieces += [(f"<0x{byte:02X}>", -12.0) for byte in range(256)] if byte_fallback else []
    made = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=byte_fallback))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(["<unk>", "</s>"])
    return made


def word_level() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "spam": 1, "eggs": 2, "[EOS]": 3}, unk_token="[UNK]"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["[UNK]", "[EOS]"])
    return made


def save(made: tokenizers.Tokenizer, folder: Path, **settings: Any) -> Path:
    """A tokenizer.json in a folder that it makes, with settings beside it if there are any."""
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    if settings:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Byte-level, copied into a tokenizer folder, from a file with all that must be switched off switched on."""
    made = byte_level(BYTE_LEVEL_SPECIALS)
    made.enable_padding(length=50, pad_id=2, pad_token="<pad>")
    made.enable_truncation(3)
    made.post_processor = processors.TemplateProcessing(
        "<s> $A <|endoftext|>", None, [("<s>", 0), ("<|endoftext|>", 1)]
    )
    made.model.dropout = 0.9
    folder = tmp_path_factory.mktemp("gpt")
    spec = HuggingFaceFile(path=str(save(made, folder / "theirs")))
    return make_tokenizer(spec, [], folder / "tokenizer")


@settings(max_examples=60, deadline=None)
@given(text=TEXTS | st.lists(st.sampled_from([*BYTE_LEVEL_SPECIALS, "a", " "])).map("".join))
def test_byte_level_any_text_comes_back(gpt: Tokenizer, text: str) -> None:
    check(gpt, text)
    np.testing.assert_array_equal(gpt.encode(text), gpt.encode(text))


def test_byte_level_reads_documents_whole_and_adds_nothing(gpt: Tokenizer) -> None:
    threads = threading.active_count(), len(os.listdir("/proc/self/task"))
    for text in SOURCES:
        check(gpt, text)
    assert (threading.active_count(), len(os.listdir("/proc/self/task"))) == threads
    assert (gpt.kind, gpt.eos_id, gpt.eos_token, gpt.vocab_size) == ("huggingface", 1, "<|endoftext|>", 600)
    assert gpt.lossless and gpt.encode("").size == 0
    assert gpt.decode(np.array([0, *gpt.encode("<s>a\n"), gpt.eos_id])) == "<s>a\n"
    assert gpt.token_bytes()[:3].tolist() == [0, 0, 0]


def test_a_tokenizer_folder_stands_on_its_own(gpt: Tokenizer, tmp_path: Path) -> None:
    theirs = save(byte_level(["<end>", "</s>", "<eos>"]), tmp_path / "theirs") / "tokenizer.json"
    made = make_tokenizer(HuggingFaceFile(path=str(theirs), eos_token="<end>"), [], tmp_path / "tokenizer")
    again = Tokenizer(tmp_path / "tokenizer")
    assert (again.eos_token, again.eos_id) == (made.eos_token, made.eos_id) == ("<end>", 0)
    assert again.source_file.read_bytes() == theirs.read_bytes() and again.sha256 == made.sha256 != gpt.sha256
    np.testing.assert_array_equal(np.load(tmp_path / "tokenizer" / "token_bytes.npy"), made.token_bytes())


def test_the_end_of_text_token_is_found_or_asked_for(tmp_path: Path) -> None:
    several, none = byte_level(["</s>", "<eos>", "<x>"]), byte_level(["<x>"])
    plain = save(several, tmp_path / "plain")
    with pytest.raises(UserError, match=r"several tokens may end a text \(</s> <eos>\); .*: </s> <eos> <x>"):
        Tokenizer(plain)
    with pytest.raises(UserError, match="no token of a usual end-of-text name; its added tokens: <x>"):
        Tokenizer(save(none, tmp_path / "none"))
    assert Tokenizer(plain, eos_token="<x>").eos_id == 2
    with pytest.raises(UserError, match="has no token '<y>'"):
        Tokenizer(plain, eos_token="<y>")
    for name in ("<eos>", {"content": "<eos>", "lstrip": False}):
        named = save(several, tmp_path / "named", eos_token=name)
        assert Tokenizer(named).eos_id == 1 and Tokenizer(named, eos_token="<x>").eos_id == 2
    with pytest.raises(UserError, match="several"):
        Tokenizer(save(several, tmp_path / "unsaid", eos_token=None))
    (tmp_path / "named" / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(UserError, match="a JSON object"):
        Tokenizer(tmp_path / "named")


def test_an_end_of_text_token_that_is_not_special_becomes_it(tmp_path: Path) -> None:
    made = byte_level(["<x>"])
    made.add_tokens(["<end>"])  # would be met in text
    for name in ("<end>", "in"):  # the second is an ordinary piece
        tokenizer = Tokenizer(save(made, tmp_path / "tokenizer"), eos_token=name)
        assert tokenizer.eos_id == made.token_to_id(name)
        check(tokenizer, f"x{name}in {name}{name}")
        assert tokenizer.decode(np.array([*tokenizer.encode("a"), tokenizer.eos_id])) == "a"
        assert tokenizer.token_bytes()[tokenizer.eos_id] == 0


def test_text_that_spells_a_piece_of_control_is_text(tmp_path: Path) -> None:
    tokenizer = Tokenizer(save(metaspace(), tmp_path / "tokenizer"))
    text = "two</s>two é</s>"
    ids = tokenizer.encode(text)
    assert tokenizer.eos_id == 1 and tokenizer.eos_id not in ids and tokenizer.decode(ids) == text
    lossy = Tokenizer(save(word_level(), tmp_path / "words"))
    assert lossy.encode("spam [EOS] [eos] eggs").tolist() == [1, 0, 0, 2]


def test_bytes_of_other_tokenizers(tmp_path: Path) -> None:
    tokenizer = Tokenizer(save(metaspace(), tmp_path / "tokenizer"))
    for text in ("two boots é漢😀", "a  b", "\x00\n"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes()[ids].sum() == len(text.encode()) + 1  # the space it puts in front
    assert not tokenizer.lossless  # of the space mark
    assert not Tokenizer(save(metaspace(byte_fallback=False), tmp_path / "no_bytes")).lossless
    words = Tokenizer(save(word_level(), tmp_path / "words"))
    assert words.token_bytes().tolist() == [0, 5, 5, 0] and not words.lossless  # joined by spaces


def test_unfit_tokenizer_files_are_refused(tokenizer: Tokenizer, gpt: Tokenizer, tmp_path: Path) -> None:
    broken = tmp_path / "tokenizer.json"
    for text in (b"", b"{", b"[]", b'{"model": {}}', b"\xff", gpt.source_file.read_bytes()[:-100]):
        broken.write_bytes(text)
        with pytest.raises(UserError, match=r"a tokenizer\.json of Hugging Face"):
            Tokenizer(tmp_path)
    speechless = tokenizers.Tokenizer(models.WordLevel({"</s>": 0}, unk_token="[UNK]"))
    speechless.add_special_tokens(["</s>"])
    with pytest.raises(UserError, match="takes any text"):
        Tokenizer(save(speechless, tmp_path / "speechless"))
    with pytest.raises(UserError, match=r"no such file(.|\n)*tokenizer\.model or tokenizer\.json"):
        Tokenizer(tmp_path / "speechless" / "nothing")
    with pytest.raises(UserError, match="no such file"):  # a folder of the other kind
        open_source(HuggingFaceFile(path=str(tokenizer.source_file.parent)))
    with pytest.raises(UserError, match="kind=sentencepiece_file"):
        open_source(HuggingFaceFile(path=str(tokenizer.source_file)))
    with pytest.raises(UserError, match="kind=huggingface_file"):
        make_tokenizer(SentencePieceFile(path=str(gpt.source_file)), [], tmp_path / "tokenizer")
    assert list((tmp_path / "tokenizer").iterdir()) == []


def test_a_folder_with_both_formats_gives_what_is_asked_for(
    tokenizer: Tokenizer, gpt: Tokenizer, tmp_path: Path
) -> None:
    for file in (tokenizer.source_file, gpt.source_file):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    assert open_source(SentencePieceFile(path=str(tmp_path))).sha256 == Tokenizer(tmp_path).sha256 == tokenizer.sha256
    assert open_source(HuggingFaceFile(path=str(tmp_path))).sha256 == gpt.sha256
    # Made anew with the other format, a tokenizer folder is all of the new one.
    make_tokenizer(SentencePieceFile(path=str(tmp_path)), [], tmp_path / "made")
    assert make_tokenizer(HuggingFaceFile(path=str(tmp_path)), [], tmp_path / "made").sha256 == gpt.sha256


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.sampled_from("a\né漢😀"), max_size=60), block_bytes=st.integers(4, 20))
def test_blocks_are_whole_characters_and_the_whole_text(text: str, block_bytes: int) -> None:
    data = text.encode()
    pieces = [data[start:stop] for start, stop in cut_blocks(data, block_bytes)]
    assert b"".join(pieces) == data
    assert all(piece.decode() and len(piece) <= block_bytes for piece in pieces)
