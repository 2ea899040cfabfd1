"""Load a tokenizer as its own files describe it, whatever model lies beside it.

`AutoTokenizer` of transformers 5 reads config.json too. For some families (Qwen2, Qwen3.5) it then takes the family's
own class instead of the one that tokenizer_config.json names, and that class makes a byte-level tokenizer out of any
vocabulary. An export of such a family would get other ids than it trained with.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from relora_ds.data import tokenizer_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GENERIC = {"TokenizersBackend", "PreTrainedTokenizerFast"}  # they read tokenizer.json as it is


def from_pretrained(name: str, samples: Sequence[str], **options) -> PreTrainedTokenizerBase:
    """`AutoTokenizer.from_pretrained`, unless that takes another class than the tokenizer's files name, with other ids.

    Args:
        name: a directory, or a Hugging Face id.
        samples: texts to compare the ids of.
        options: `local_files_only` and `trust_remote_code`.

    Raises:
        Exception: whatever `AutoTokenizer` raises, where the files alone do not help either.
    """
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    config = get_tokenizer_config(name, local_files_only=options["local_files_only"])
    declared = None if "auto_map" in config else config.get("tokenizer_class")
    try:
        found = AutoTokenizer.from_pretrained(name, **options)
    except Exception:
        if declared and (own := _by_its_files(name, None, samples, options)):
            return own
        raise
    kind = type(found).__name__
    if not declared or kind in _GENERIC or kind.removesuffix("Fast") == declared.removesuffix("Fast"):
        return found
    return _by_its_files(name, found, samples, options) or found


def _by_its_files(
    name: str, found: PreTrainedTokenizerBase | None, samples: Sequence[str], options: dict
) -> PreTrainedTokenizerBase | None:
    """Load a tokenizer without config.json: as tokenizer.json has it, else a sentencepiece model in its declared class.

    found: preferred where it gives the ids of tokenizer.json. None: there are no such files, or they cannot be read.
    """
    from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerFast

    origin = tokenizer_files.origin(name)
    own = exact = None
    with suppress(Exception):  # the library raises nothing more exact
        own = AutoTokenizer.from_pretrained(name, config=PreTrainedConfig(), **options)
    if origin is None or not (origin / "tokenizer.json").is_file():
        has_pieces = origin is not None and any((origin / file).is_file() for file in tokenizer_files.SENTENCEPIECE)
        return own if has_pieces else None
    with suppress(Exception):
        exact = PreTrainedTokenizerFast.from_pretrained(name, local_files_only=True)
    if exact is None:
        return own
    same = (given for given in (found, own) if given is not None and _ids(given, samples) == _ids(exact, samples))
    return next(same, exact)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False)["input_ids"]
