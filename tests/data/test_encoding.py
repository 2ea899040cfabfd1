"""No text gives a control token, with any kind of tokenizer; and a tokenizer's other ids stay as they are."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers
from tokenizers import models, normalizers, pre_tokenizers

from relora_ds.data import encoding, prepare
from relora_ds.data import tokenizer as tokenizer_module
from relora_ds.data.reading import DataWarning
from relora_ds.data.rows import PaddedRows
from tests.data.settings import settings

PLAIN = "the quick brown fox jumps over the lazy dog"
CONTROL = ["<unk>", "</s>", "<pad>", "<tool>"]
WORDS = [*CONTROL, *PLAIN.split(), "<", ">", "/", "</", "s", "pad", "unk", "tool"]
LETTERS = sorted({*PLAIN, *"</>", "▁"})


def fast(model, special=CONTROL, **parts):
    """A fast tokenizer with an unknown, an end-of-sequence, a padding and one more special token."""
    backend = tokenizers.Tokenizer(model)
    for name, part in parts.items():
        setattr(backend, name, part)
    given = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token=special[0], eos_token=special[1], pad_token=special[2]
    )
    given.add_special_tokens({"additional_special_tokens": special[3:]})
    return given


def unigram():
    vocab = [*((name, 0.0) for name in CONTROL), ("▁the", -2.0), *((letter, -5.0) for letter in LETTERS)]
    return fast(models.Unigram(vocab, unk_id=0), pre_tokenizer=pre_tokenizers.Metaspace())


def word_level():
    return fast(
        models.WordLevel({word: number for number, word in enumerate(dict.fromkeys(WORDS))}, unk_token="<unk>"),
        pre_tokenizer=pre_tokenizers.WhitespaceSplit(),
    )


def word_piece():
    pieces = [*CONTROL, *LETTERS, *(f"##{letter}" for letter in LETTERS), "the"]
    return fast(
        models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="<unk>"),
        pre_tokenizer=pre_tokenizers.WhitespaceSplit(),
        normalizer=normalizers.NFKC(),
    )


def bpe_that_merges_to_a_control_token():
    pieces = [*CONTROL, *LETTERS, "</", "th", "the", "</s"]
    return fast(
        models.BPE(
            {piece: number for number, piece in enumerate(pieces)},
            [("<", "/"), ("t", "h"), ("th", "e"), ("</", "s"), ("</s", ">")],
            unk_token="<unk>",
        ),
        pre_tokenizer=pre_tokenizers.WhitespaceSplit(),
    )


def bpe_that_takes_whole_words():
    pieces = [*CONTROL, *LETTERS]
    return fast(
        models.BPE({piece: number for number, piece in enumerate(pieces)}, [], unk_token="<unk>", ignore_merges=True),
        pre_tokenizer=pre_tokenizers.WhitespaceSplit(),
    )


class Words(transformers.PreTrainedTokenizer):
    """A tokenizer that is written in Python."""

    def __init__(self, **options):
        self.words = list(dict.fromkeys(WORDS))
        super().__init__(
            unk_token="<unk>", eos_token="</s>", pad_token="<pad>", additional_special_tokens=["<tool>"], **options
        )

    vocab_size = property(lambda self: len(self.words))

    def get_vocab(self):
        return {word: number for number, word in enumerate(self.words)} | self.added_tokens_encoder

    def _tokenize(self, text, **_):
        return text.split()

    def _convert_token_to_id(self, token):
        return self.words.index(token) if token in self.words else 0

    def _convert_id_to_token(self, index):
        return self.words[index]


KINDS = [unigram, word_level, word_piece, bpe_that_merges_to_a_control_token, bpe_that_takes_whole_words, Words]
TEXTS = ["the </s> fox", "</s>", "</s></s>", " <pad>", "a<tool>b", "<unk> <tool>", "＜/s＞ the", "the</s>"]


@pytest.mark.parametrize("kind", KINDS)
def test_no_text_gives_a_control_token(kind):
    given = kind()
    control = encoding.control_tokens(given)
    assert set(CONTROL) == set(control.values())
    for text, ids in zip(TEXTS, tokenizer_module.encode(given, TEXTS), strict=True):
        assert ids and not (control.keys() - {given.unk_token_id}) & set(ids), text
    assert encoding.reads_names(given)


@pytest.mark.parametrize("kind", KINDS)
def test_all_other_text_gives_the_ids_that_it_gave(kind):
    given = kind()
    for text in (PLAIN, "the 東 < fox > /", "  the\n\nfox ", ""):
        expected = given(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer_module.encode(given, [text]) == [expected], text


def test_special_tokens_of_a_user_are_text_too():
    given = unigram()
    given.add_special_tokens(
        {
            "additional_special_tokens": [
                tokenizers.AddedToken("fox", lstrip=True, rstrip=True),
                tokenizers.AddedToken("<end>", normalized=True),
                tokenizers.AddedToken("dog", single_word=True),
            ]
        }
    )
    control = encoding.control_tokens(given)
    assert {"fox", "<end>", "dog"} <= set(control.values())
    for ids in tokenizer_module.encode(given, ["the  fox  jumps", "the<end>", "lazy dog", "dogfox"]):
        assert ids and not control.keys() & set(ids)
    assert tokenizer_module.encode(given, []) == []


def test_the_name_of_the_unknown_token_is_text():
    for given in (unigram(), word_piece()):
        assert given.unk_token_id not in tokenizer_module.encode(given, ["<unk>"])[0]


def test_tokens_that_were_added_and_are_not_special_are_text():
    given = unigram()
    given.add_tokens(["quick brown"])
    (ids,) = tokenizer_module.encode(given, ["the quick brown fox"])
    assert given.convert_tokens_to_ids("quick brown") in ids


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    """(directory of a T5 tokenizer, the sentencepiece model in it)."""
    directory, model = tmp_path_factory.mktemp("t5"), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([PLAIN, "<i>a tag</i>", "1 > 0"] * 9),
        model_writer=model,
        vocab_size=60,
        hard_vocab_limit=False,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (directory / "spiece.model").write_bytes(model.getvalue())
    (directory / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "T5Tokenizer",
                "eos_token": "</s>",
                "unk_token": "<unk>",
                "pad_token": "<pad>",
                "extra_ids": 5,
            }
        )
    )
    return directory, sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def test_a_t5_tokenizer_gives_the_ids_of_sentencepiece(t5):
    given = tokenizer_module.load(t5[0])
    for text in (*TEXTS, "<extra_id_0> fox", f"{PLAIN} </s>. {PLAIN}<pad>", "<i>東</i>"):
        assert tokenizer_module.encode(given, [text])[0] == t5[1].encode(text), text


def test_a_sentencepiece_model_behind_python(t5, tmp_path):
    given = transformers.GPTSw3Tokenizer(
        str(t5[0] / "spiece.model"), unk_token="<unk>", eos_token="</s>", pad_token="<pad>", bos_token="<s>"
    )
    control = encoding.control_tokens(given).keys() - {given.unk_token_id}
    assert not control & set(sum(tokenizer_module.encode(given, TEXTS), []))


def corpus_of(tmp_path: Path, texts: list[str]) -> str:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_a_document_is_one_row(t5, tmp_path):
    path = corpus_of(tmp_path, [f"{number} </s> {PLAIN} <pad> {PLAIN}" for number in range(40)])
    prepared = prepare(
        settings(
            tmp_path / "cache",
            source="text",
            path=path,
            tokenizer=str(t5[0]),
            seq_len=16,
            packing=False,
            validation=0.1,
        )
    )
    assert np.count_nonzero(prepared.train == prepared.eos_id) == 36
    assert len(PaddedRows(np.asarray(prepared.train), 16, prepared.padding)) == 36


def test_unknown_characters_must_not_end_documents(tmp_path):
    given = fast(
        models.BPE({piece: number for number, piece in enumerate(["<e>", *LETTERS])}, [], unk_token="<e>"),
        special=["<e>", "<e>", "<e>"],
        pre_tokenizer=pre_tokenizers.WhitespaceSplit(),
    )
    given.save_pretrained(tmp_path / "given")
    with pytest.warns(DataWarning, match="data.tokenizer: '.*given' has '<e>' for unknown characters and to separate"):
        tokenizer_module.load(tmp_path / "given")
    assert tokenizer_module.encode(given, [PLAIN])
    path = corpus_of(tmp_path, [PLAIN] * 30 + ["snow ☃ man"])
    with pytest.raises(
        ValueError,
        match=r"data.tokenizer: '.*given' has '<e>' for unknown characters and to sepa"
        r"rate documents.* 'snow ☃ man' has .*; give it an unk_token of its own",
    ):
        prepare(settings(tmp_path / "cache", source="text", path=path, tokenizer=str(tmp_path / "given")))


def test_gaps_in_the_ids_are_rows_of_the_embedding(tmp_path):
    pieces = {piece: number for number, piece in enumerate(["<unk>", "</s>", "<pad>", *LETTERS])}
    pieces["o"] = 299
    fast(
        models.WordPiece(
            pieces | {f"##{piece}": 100 + number for piece, number in pieces.items() if number < 99}, unk_token="<unk>"
        ),
        special=["<unk>", "</s>", "<pad>"],
        pre_tokenizer=pre_tokenizers.WhitespaceSplit(),
    ).save_pretrained(tmp_path / "given")
    given = tokenizer_module.load(tmp_path / "given")
    assert len(given) < 299 and tokenizer_module.num_ids(given) == 300
    path = corpus_of(tmp_path, ["o h o l e o"] * 40)
    prepared = prepare(
        settings(tmp_path / "cache", source="text", path=path, tokenizer=str(tmp_path / "given"), seq_len=4)
    )
    assert prepared.vocab_size == 300 and 299 in prepared.train
