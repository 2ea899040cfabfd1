"""Tokenizers: any Hugging Face one, or a sentencepiece BPE trained on the corpus.

A trained tokenizer is a directory with `tokenizer.model` and `tokenizer_config.json` that
`transformers.AutoTokenizer` loads. Three decisions in it:

* no normalisation at all (identity, spaces kept, bytes as the fallback), so that decoding gives the text
  back and perplexity per word or per byte means something. The one exception is sentencepiece's own: U+2581
  becomes a space.
* `add_dummy_prefix` off. With it, transformers drops the extra space wherever a text already starts with one
  and sentencepiece does not, so the ids differ; without it both agree on every string.
* newlines are never part of a longer piece (training sees one line at a time), so a long document can be
  tokenized line by line with the same result.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sentencepiece

from relora_ds.config.remote_code import UntrustedCode, is_refusal
from relora_ds.data import encoding, hub, tokenizer_class, tokenizer_files
from relora_ds.data.localfiles import first_line
from relora_ds.data.reading import DataWarning

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINING: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "unk_id": 0,
    "bos_id": 1,
    "eos_id": 2,
    "pad_id": 3,
}
# Much more text does not change the merges of a small vocabulary, and all of it is held in memory.
MAX_TRAINING_CHARACTERS = 100_000_000
# sentencepiece silently skips what is longer than max_sentence_length bytes, so cut lines instead.
MAX_LINE_CHARACTERS = 8192

CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "unk_token": "<unk>",
    "bos_token": "<s>",
    "eos_token": "</s>",
    "pad_token": "<pad>",
    "add_bos_token": False,
    "add_eos_token": False,
    "add_prefix_space": False,
    "legacy": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 10**30,  # transformers' own "no limit"
}

SAMPLES = (
    "The quick brown fox jumps over the lazy dog.",
    " = Title = \n \n A line , with @-@ marks .\n",
    "  two  spaces   three    four ",
    "In 2016, 1234567890 of 3.14159; 007",
    "naïve façade, Δx ≈ π, 東京都, 🙂👩‍👩‍👧, e\u0301, \u00a0nbsp\u200b",
    "def f(x):\n\treturn {x: '\\n'}\r\n\n\n",
    "</s> <s>text that only looks special<unk> <pad>",
)


def train(documents: Iterable[str], vocab_size: int, out_dir: str | Path) -> PreTrainedTokenizerBase:
    """Train on `documents`, write the tokenizer into `out_dir`, and return it, loaded back and verified.

    The same documents give the same tokenizer, to the bit, with the same version of sentencepiece. Reads the first 100
    million characters at most.
    Raises ValueError when the documents hold no text, or when `vocab_size` is too large for them or too
    small for the characters in them; RuntimeError when transformers would tokenize otherwise than
    sentencepiece.
    """
    lines = list(_lines(documents))  # a list: an error while reading must not have to pass through sentencepiece
    if not lines:
        raise ValueError("data.source: the corpus holds no text to train a tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            vocab_size=vocab_size,
            max_sentence_length=4 * MAX_LINE_CHARACTERS,
            minloglevel=2,
            **TRAINING,
        )
    except RuntimeError as error:
        raise _clear_error(error, vocab_size) from error
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "tokenizer.model").write_bytes(model.getvalue())
    (out_dir / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=2) + "\n", encoding="utf-8")
    tokenizer = load(out_dir)
    verify(tokenizer, out_dir / "tokenizer.model")
    with tempfile.TemporaryDirectory() as saved:  # an exported model directory holds the re-saved form
        tokenizer_files.save(tokenizer, Path(saved))
        verify(load(saved), out_dir / "tokenizer.model")
    return tokenizer


def load(name_or_path: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Return the tokenizer that the files at `name_or_path` describe, see tokenizer_class.py, after checks.

    trust_remote_code: whether code that comes with the tokenizer may run. It is never asked for on stdin.

    Raises ValueError: nothing there, code that is not trusted, no end-of-sequence token, or a vocabulary that was
    silently lost (transformers 5 builds a 3-token LlamaTokenizer where it does not find the vocabulary).
    """
    local = Path(name_or_path).expanduser()
    name = str(local) if local.is_dir() else str(name_or_path)
    # Without a connection the Hugging Face cache may hold it; asking the hub first would take most of a minute.
    reason = "" if local.is_dir() or hub.is_offline() else hub.why_unreachable(name, "model")
    try:
        tokenizer = tokenizer_class.from_pretrained(
            name, SAMPLES, local_files_only=bool(reason), trust_remote_code=trust_remote_code
        )
    except Exception as error:  # OSError, ValueError, KeyError, …, by what is wrong with the directory
        if is_refusal(error):
            raise ValueError(f"data.tokenizer: {UntrustedCode(name)}") from error
        raise ValueError(
            f"data.tokenizer: {name!r} cannot be loaded ({reason or first_line(error)}); give a directory that holds a "
            f"tokenizer, or a Hugging Face id that can be reached or is in the Hugging Face cache"
        ) from error
    expected = _num_pieces(Path(name) / "tokenizer.model")
    if len(tokenizer) < expected or len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(
            f"data.tokenizer: {name!r} loads with {len(tokenizer)} tokens instead of "
            f"{expected or 'a vocabulary'}; the directory needs tokenizer.json, "
            f"or tokenizer.model with a matching tokenizer_config.json"
        )
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"data.tokenizer: {name!r} has no end-of-sequence token; set eos_token in its "
            f"tokenizer_config.json, documents are separated by it"
        )
    if encoding.separates_at_unknown(tokenizer):
        warnings.warn(
            f"data.tokenizer: {name!r} has {tokenizer.eos_token!r} for unknown characters and to separate documents; "
            f"a text with an unknown character will be refused, give it an unk_token of its own",
            DataWarning,
            stacklevel=2,
        )
    return tokenizer


def num_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the rows that an embedding needs: more than there are tokens where the ids have gaps."""
    return max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))


def verify(tokenizer: PreTrainedTokenizerBase, model_file: str | Path) -> None:
    """Raise RuntimeError unless `tokenizer` has the vocabulary and gives the ids of the sentencepiece model.

    Also checks that the samples decode to themselves.
    """
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
    if len(tokenizer) != pieces.get_piece_size():
        raise RuntimeError(f"transformers loads {len(tokenizer)} tokens of {pieces.get_piece_size()} in {model_file}")
    for sample, ids in zip(SAMPLES, encode(tokenizer, SAMPLES), strict=True):
        if ids != pieces.encode(sample):
            raise RuntimeError(f"transformers encodes {sample!r} as {ids}, sentencepiece as {pieces.encode(sample)}")
        if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != sample:
            raise RuntimeError(f"{sample!r} does not survive encoding and decoding: {tokenizer.decode(ids)!r}")


def encode(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> list[list[int]]:
    """Token ids of each text: no special tokens added, none read out of it ("</s>" is 4 characters).

    Raises ValueError where the tokenizer does not allow that, see encoding.py.
    """
    return encoding.encoder_of(tokenizer).encode(list(texts))


def _lines(documents: Iterable[str]) -> Iterator[str]:
    num_characters = 0
    for document in documents:
        for line in document.split("\n"):
            for start in range(0, len(line), MAX_LINE_CHARACTERS):
                piece = line[start : start + MAX_LINE_CHARACTERS]
                if piece.strip():
                    num_characters += len(piece)
                    yield piece
        if num_characters >= MAX_TRAINING_CHARACTERS:
            return


def _clear_error(error: RuntimeError, vocab_size: int) -> Exception:
    """sentencepiece reports both bounds as a failed C++ assertion."""
    if found := re.search(r"set it to a value <= (\d+)", str(error)):
        return ValueError(
            f"data.vocab_size: {vocab_size} is more than this corpus can fill; "
            f"use at most {found[1]} or a larger corpus"
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        return ValueError(
            f"data.vocab_size: {vocab_size} does not hold the corpus' characters; use more than {found[1]}"
        )
    return error


def _num_pieces(model_file: Path) -> int:
    """Size of a sentencepiece model; 0 if there is none (some families use the name for another format)."""
    if not model_file.is_file():
        return 0
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(model_file)).get_piece_size()
    except RuntimeError:
        return 0
