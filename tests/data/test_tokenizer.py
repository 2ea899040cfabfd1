"""The trained tokenizer is the same thing to sentencepiece and to transformers."""

import json
from pydoc_data.topics import topics

import pytest
import sentencepiece

from relora_ds.data import tokenizer as tokenizers

TEXTS = [topics[key] for key in sorted(topics)]
HARD = (
    "",
    " ",
    "\n",
    " a",
    "  two  spaces",
    "x" * 300,
    "2024-11-21",
    "naïve 東京 🙂",
    "\t\r\n",
    "</s><unk>",
    "\x00",
    "<0x0A>",
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizer")
    return tokenizers.train(TEXTS, 1000, directory), directory


def test_ids_equal_sentencepiece_and_decode_to_the_text(trained):
    tokenizer, directory = trained
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    texts = [*HARD, *TEXTS]
    for text, ids in zip(texts, tokenizers.encode(tokenizer, texts), strict=True):
        assert ids == pieces.encode(text), text[:40]
        assert tokenizer.decode(ids) == text
    assert len(tokenizer) == pieces.get_piece_size() == 1000
    names = (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert names == (0, 1, 2, 3)


def test_exported_copy_is_the_same_tokenizer(trained, tmp_path):
    tokenizer, _ = trained
    tokenizer.save_pretrained(tmp_path)
    again = tokenizers.load(tmp_path)
    assert tokenizers.encode(again, TEXTS) == tokenizers.encode(tokenizer, TEXTS)
    assert again.eos_token_id == 2 and len(again) == 1000


def test_pieces_cut_at_line_ends_give_the_same_ids(trained):
    tokenizer, _ = trained
    whole, lines = (
        tokenizers.encode(tokenizer, TEXTS[:3]),
        [text.splitlines(keepends=True) for text in TEXTS[:3]],
    )
    assert whole == [sum(tokenizers.encode(tokenizer, part), []) for part in lines]


def test_training_is_deterministic_and_silent(trained, tmp_path, capfd):
    tokenizers.train(TEXTS, 1000, tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == (trained[1] / "tokenizer.model").read_bytes()
    assert "trainer" not in "".join(capfd.readouterr())


def test_long_lines_count_in_training(tmp_path):
    """sentencepiece alone skips lines of more than 4192 bytes without a word."""
    line = " ".join(TEXTS).replace("\n", " ") + " zyxwvut" * 2000  # the end of the line must count too
    tokenizer = tokenizers.train([line], 1000, tmp_path)
    assert len(tokenizers.encode(tokenizer, [" zyxwvut"])[0]) == 1


@pytest.mark.parametrize(
    ("documents", "vocab_size", "message"),
    [
        (
            ["a short text\n"],
            8192,
            r"data.vocab_size: 8192 is more than this corpus can fill; use at most \d+",
        ),
        (
            ["".join(map(chr, range(0x4E00, 0x4F00)))],
            300,
            r"data.vocab_size: 300 does not hold .* use more than \d+",
        ),
        ([" \n ", ""], 1000, "holds no text"),
    ],
)
def test_impossible_vocabulary_is_a_clear_error(tmp_path, documents, vocab_size, message):
    with pytest.raises(ValueError, match=message):
        tokenizers.train(documents, vocab_size, tmp_path)


def test_suggested_vocabulary_works(tmp_path):
    with pytest.raises(ValueError) as error:
        tokenizers.train(TEXTS[:1], 100_000, tmp_path)
    largest = int(str(error.value).split("use at most ")[1].split()[0])
    assert len(tokenizers.train(TEXTS[:1], largest, tmp_path)) == largest


def test_lost_vocabulary_is_refused(trained, tmp_path):
    """Without tokenizer.model transformers silently builds a tokenizer of special tokens only."""
    config = trained[1] / "tokenizer_config.json"
    (tmp_path / "tokenizer_config.json").write_text(config.read_text())
    with pytest.raises(ValueError, match="loads with 4 tokens"):
        tokenizers.load(tmp_path)


def test_verify_sees_a_difference(trained, tmp_path):
    """With the dummy prefix transformers drops a space that sentencepiece keeps."""
    _, directory = trained
    config = json.loads((directory / "tokenizer_config.json").read_text()) | {"add_prefix_space": True}
    (tmp_path / "tokenizer.model").write_bytes((directory / "tokenizer.model").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(RuntimeError, match="transformers encodes"):
        tokenizers.verify(tokenizers.load(tmp_path), tmp_path / "tokenizer.model")


def test_load_needs_a_tokenizer_with_eos(trained, tmp_path):
    with pytest.raises(ValueError, match="cannot be loaded"):
        tokenizers.load(tmp_path)
    trained[0].save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        tokenizers.load(tmp_path)
