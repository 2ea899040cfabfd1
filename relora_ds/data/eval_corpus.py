"""Text in the ids of any tokenizer, to evaluate any model on it. Nothing is cached."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from relora_ds.data import checks, corpora, localfiles, tokenization, tokenizer
from relora_ds.data.mixture import combined, prepare
from relora_ds.data.preparation import Part, PreparedData
from relora_ds.data.reading import Documents
from relora_ds.data.rows import layout_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from relora_ds.config import DataConfig


def validation_of(data: DataConfig, given: PreTrainedTokenizerBase, trust_remote_code: bool = False) -> PreparedData:
    """Return the validation split of a `data.` section, in the ids of `given`; the training split is empty.

    trust_remote_code: see `tokenizer.load`. Errors: see `mixture.prepare`; ValueError too for a pre-tokenized
    corpus in the ids of another tokenizer.
    """
    if found := checks.problems(data):
        raise ValueError("\n".join(found))
    if data.mix is not None:
        parts = zip(data.mix, data.parts(), strict=True)
        return combined(
            [Part(one.label, one.weight, validation_of(part, given, trust_remote_code)) for one, part in parts]
        )
    if data.source == "pretokenized":
        prepared = prepare(data, trust_remote_code=trust_remote_code)
        if tokenizer.load(prepared.tokenizer_dir, trust_remote_code).get_vocab() != given.get_vocab():
            raise ValueError(
                f"--data: {data.path!r} is pre-tokenized, and in another vocabulary than the model's; "
                "give the text itself"
            )
        return prepared
    corpus = corpora.open_corpus(data)
    validation = corpus.open().validation
    assert validation is not None  # it has been held out where the corpus has none
    return _tokenized(validation, given, data, corpus.max_validation_tokens)


def files_in(path: str, data: DataConfig, given: PreTrainedTokenizerBase) -> PreparedData:
    """All of the text in files (see `localfiles`), in the ids of `given`; the training split is empty."""
    return _tokenized(localfiles.documents_of(localfiles.find(path, "--data"), data.text_column), given, data)


def _tokenized(
    documents: Documents, given: PreTrainedTokenizerBase, data: DataConfig, max_tokens: int | None = None
) -> PreparedData:
    dtype = tokenization.dtype_of(given)
    with tempfile.TemporaryDirectory() as name:
        progress = tokenization.Progress(revision="")
        tokenization.write_tokens(
            Path(name), "validation", documents, given, dtype, progress, max_tokens, whole_documents=True
        )
        tokens = np.fromfile(Path(name) / "validation.bin", dtype)
    if not len(tokens):
        raise ValueError("--data: there is no text to evaluate on")
    pad_id = given.eos_token_id if given.pad_token_id is None else given.pad_token_id
    return PreparedData(
        train=tokens[:0],
        validation=tokens,
        validation_words=progress.validation.words,
        validation_bytes=progress.validation.bytes,
        tokenizer_dir=given.name_or_path,
        vocab_size=tokenizer.num_ids(given),
        eos_id=given.eos_token_id,
        fingerprint="",
        directory=Path(),
        layout=layout_of(data, given.eos_token_id, pad_id),
    )
