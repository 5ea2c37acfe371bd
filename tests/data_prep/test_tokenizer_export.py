"""The exported tokenizer.json cuts text as ours does, also through transformers, or a note says where it does not."""

from __future__ import annotations

import io
import json
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, processors, trainers

from configs.errors import UserError
from configs.tokenizers import SentencePieceTraining
from data_prep.sentencepiece_file import BYTE, CONTROL, UNKNOWN, USER_DEFINED, PieceFile
from data_prep.tokenizer import Tokenizer, make_tokenizer
from data_prep.tokenizer_export import compare, convert, export_tokenizer, refuse_larger

STDLIB = Path(sysconfig.get_path("stdlib"))
FILES = sorted(path for package in ("email", "json", "unittest", "asyncio") for path in (STDLIB / package).glob("*.py"))
SOURCES = [path.read_text(encoding="utf-8") for path in FILES]
TRAINED_ON = [line for text in SOURCES[:12] for line in text.split("\n") if line]
ODD = [
    "", " ", "  \n\n\t\t \r\n", "</s><unk><0x41> <0x0A>", "a</s>b", "x\u2581 \u2581\u2581y", "\ufeff\x00\x7f",
    "é漢字😀 ñandú \u0301combining ﬁ", "\u200b\u2028\u00a0", "🏳️‍🌈 🇨🇭", "ﷺ" * 20,
    *(" " * n for n in range(70)), *("=" * n + "ab" * n + "\n" * n for n in range(40)),
]  # fmt: skip


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    spec = SentencePieceTraining(algorithm="bpe", vocab_size=1500)
    return make_tokenizer(spec, TRAINED_ON, tmp_path_factory.mktemp("bpe"))


@pytest.fixture(scope="module")
def unigram(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    spec = SentencePieceTraining(algorithm="unigram", vocab_size=1500)
    return make_tokenizer(spec, TRAINED_ON, tmp_path_factory.mktemp("unigram"))


@pytest.fixture(scope="module")
def exported_bpe(bpe: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> tokenizers.Tokenizer:
    """As a reader of the folder alone would have it."""
    folder = tmp_path_factory.mktemp("exported")
    assert export_tokenizer(bpe, folder, SOURCES[:3]).notes == ()
    theirs = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    theirs.encode_special_tokens = True
    return theirs


def test_bpe_is_cut_alike_everywhere(bpe: Tokenizer, exported_bpe: tokenizers.Tokenizer) -> None:
    assert sum(len(text.encode()) for text in SOURCES) > 900_000
    for text in [*SOURCES, *ODD]:
        ids = bpe.encode(text)
        assert exported_bpe.encode(text).ids == ids.tolist(), text[:80]
        assert exported_bpe.decode(ids.tolist()) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from("aeinrst  ==\n\t\r_(.\u2581é漢😀</s>0x1A"), max_size=60) | st.text(max_size=60))
def test_bpe_is_cut_alike_for_any_text(bpe: Tokenizer, exported_bpe: tokenizers.Tokenizer, text: str) -> None:
    assert exported_bpe.encode(text).ids == bpe.encode(text).tolist()


def test_unigram_is_cut_alike_but_for_ties(unigram: Tokenizer, tmp_path: Path) -> None:
    """Where it is not, the other way scores as much; runs of one character have such ways."""
    exported = export_tokenizer(unigram, tmp_path, SOURCES[:3])
    assert exported.files == ("tokenizer.model", "tokenizer.json", "tokenizer_config.json")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    scores = np.array(PieceFile.read(unigram.source_file).scores)
    lines = [line for text in SOURCES for line in text.split("\n")]
    found = compare(unigram, theirs, [*lines, *ODD], scores)
    assert found.same_but_for_ties
    assert found.differ < 0.01 * found.texts
    runs = compare(unigram, theirs, [" " * n for n in range(200)], scores)
    assert runs.differ == runs.ties > 0
    assert len(exported.notes) == 1 and "rounding decides" in exported.notes[0]


def test_comparing_sees_what_is_no_tie(unigram: Tokenizer) -> None:
    model = PieceFile.read(unigram.source_file)
    tree = json.loads(convert(model).to_str())
    common = max(range(4, len(model.pieces)), key=lambda n: len(model.pieces[n]) * (model.kinds[n] == 1))
    tree["model"]["vocab"][common][1] = -1e3
    theirs = tokenizers.Tokenizer.from_str(json.dumps(tree))
    text = model.pieces[common].replace("\u2581", " ")
    found = compare(unigram, theirs, [text], np.array(model.scores))
    assert (found.differ, found.ties, found.same_but_for_ties) == (1, 0, False)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("model_type", ["qwen3_moe", "glam"])
def test_transformers_loads_it(
    kind: str, model_type: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import transformers  # seconds

    ours: Tokenizer = request.getfixturevalue(kind)
    export_tokenizer(ours, tmp_path, max_tokens=2048)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.eos_token_id, theirs.eos_token, theirs.model_max_length) == (ours.eos_id, ours.eos_token, 2048)
    assert len(theirs) == ours.vocab_size
    texts = [text for text in [*SOURCES[:2], *ODD] if kind == "bpe" or ("==" not in text and "  " not in text)]
    assert len(texts) > 8
    for text in texts:
        encoded = theirs(text)
        assert encoded["input_ids"] == ours.encode(text).tolist()
        assert theirs.decode(encoded["input_ids"]) == text
        assert set(encoded) == {"input_ids", "attention_mask"}  # a decoder refuses others
    assert theirs.decode([*ours.encode("a b"), ours.eos_id], skip_special_tokens=True) == "a b"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_model_file_is_read_as_the_library_reads_it(kind: str, request: pytest.FixtureRequest) -> None:
    file = request.getfixturevalue(kind).source_file
    library: Any = sentencepiece.SentencePieceProcessor(model_file=str(file))
    model = PieceFile.read(file)
    numbers = range(library.vocab_size())
    assert list(model.pieces) == [library.id_to_piece(n) for n in numbers]
    assert list(model.scores) == [library.get_score(n) for n in numbers]
    assert [kind == BYTE for kind in model.kinds] == [library.is_byte(n) for n in numbers]
    assert [kind == CONTROL for kind in model.kinds] == [library.is_control(n) for n in numbers]
    assert [kind == UNKNOWN for kind in model.kinds] == [library.is_unknown(n) for n in numbers]
    assert [model.pieces[n] for n in numbers if model.kinds[n] == USER_DEFINED] == ["\n", "\t"]
    assert model.unlike_ours() == [] and model.is_bpe == (kind == "bpe")


def foreign(tmp_path: Path, **options: Any) -> Tokenizer:
    """A SentencePiece model trained elsewhere."""
    made = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINED_ON), model_writer=made, minloglevel=2, **{"vocab_size": 600, **options}
    )
    (tmp_path / "foreign.model").write_bytes(made.getvalue())
    return Tokenizer(tmp_path / "foreign.model")


@pytest.mark.parametrize(
    ("options", "reasons"),
    [
        (
            {"byte_fallback": True, "normalization_rule_name": "identity"},
            ["a space before each text", "removes spaces"],
        ),
        ({"byte_fallback": True, "add_dummy_prefix": False, "remove_extra_whitespaces": False}, ["normalises"]),
        ({"normalization_rule_name": "identity", "add_dummy_prefix": False}, ["no pieces for bytes"]),
        ({"model_type": "char", "vocab_size": 80}, ["words or characters"]),
    ],
)
def test_foreign_models_go_as_they_are(options: dict[str, Any], reasons: Sequence[str], tmp_path: Path) -> None:
    source = foreign(tmp_path, **{"model_type": "bpe", **options})
    out = tmp_path / "out"
    out.mkdir()
    exported = export_tokenizer(source, out)
    assert [path.name for path in out.iterdir()] == ["tokenizer.model"] and exported.files == ("tokenizer.model",)
    assert len(exported.notes) == 1 and all(reason in exported.notes[0] for reason in reasons)


LOSSLESS = {
    "model_type": "bpe", "byte_fallback": True, "normalization_rule_name": "identity", "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
}  # fmt: skip


def test_user_defined_pieces_of_many_characters(tmp_path: Path) -> None:
    source = foreign(tmp_path, **LOSSLESS, user_defined_symbols=["\n", "self", "self.assert"])
    out = tmp_path / "out"
    out.mkdir()
    exported = export_tokenizer(source, out, SOURCES)
    assert "tokenizer.json" in exported.files and exported.notes == ()
    theirs = tokenizers.Tokenizer.from_file(str(out / "tokenizer.json"))
    text = "   self.assertEqual(self, myself)\n" * 3
    assert theirs.encode(text).ids == source.encode(text).tolist()


def test_a_file_that_would_cut_elsewhere_is_not_written(tmp_path: Path) -> None:
    """SentencePiece never finds a user-defined piece with a space in it; Hugging Face's would."""
    source = foreign(tmp_path, **LOSSLESS, user_defined_symbols=["\n", "  "])
    out = tmp_path / "out"
    out.mkdir()
    exported = export_tokenizer(source, out, SOURCES[:2])
    assert [path.name for path in out.iterdir()] == ["tokenizer.model"]
    assert len(exported.notes) == 1 and "no tokenizer.json: it would cut" in exported.notes[0]


@pytest.mark.parametrize("damage", [b"\x0a\xff", b"not a model", b""])
def test_a_file_that_is_no_model_is_refused(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.model").write_bytes(damage)
    if damage:
        with pytest.raises(UserError, match=r"x\.model"):
            PieceFile.read(tmp_path / "x.model")
    else:  # an empty message is one of no pieces: not what was trained here
        assert "it has no pieces for bytes" in PieceFile.read(tmp_path / "x.model").unlike_ours()


def huggingface(folder: Path, **additions: Any) -> Tokenizer:
    """A byte-level tokenizer.json as people bring one, with its EOS named beside it."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<|bos|>", "<|eos|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(TRAINED_ON[:500], trainer)
    if additions.get("bos"):
        made.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    if additions.get("truncation"):
        made.enable_truncation(8)
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|eos|>", "chat_template": "{{x}}"}))
    return Tokenizer(folder)


def test_a_huggingface_file_is_copied(tmp_path: Path) -> None:
    source = huggingface(tmp_path / "in")
    (tmp_path / "out").mkdir()
    exported = export_tokenizer(source, tmp_path / "out", SOURCES[:2])
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == source.source_file.read_bytes()
    settings_there = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert settings_there["eos_token"] == "<|eos|>" and settings_there["chat_template"] == "{{x}}"
    assert len(exported.notes) == 1 and "spell <|eos|>" in exported.notes[0]


def test_what_a_huggingface_file_adds_or_cuts_is_left_out(tmp_path: Path) -> None:
    source = huggingface(tmp_path / "in", bos=True, truncation=True)
    (tmp_path / "out").mkdir()
    exported = export_tokenizer(source, tmp_path / "out")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert theirs.encode(SOURCES[0]).ids == source.encode(SOURCES[0]).tolist()
    assert "truncation, post_processor" in exported.notes[0]


def test_a_tokenizer_larger_than_the_model_is_refused(bpe: Tokenizer) -> None:
    refuse_larger(bpe, 1500)
    with pytest.raises(UserError, match="1500 entries, the model's vocabulary 1499"):
        refuse_larger(bpe, 1499)
