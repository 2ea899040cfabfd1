"""Write a tokenizer so that other people's programs give the ids that the run trained with.

`save_pretrained` of transformers 5 alone is not enough for that:

* it leaves out the sentencepiece model, from which llama.cpp's converter takes the scores of the pieces. Without it the
  converter writes a model that splits text in another way, and says nothing.
* it leaves out `add_bos_token` and `add_eos_token`, because tokenizer.json has them in its post-processor. llama.cpp
  and transformers 4 then fall back on their own default, which for LLaMA is a beginning-of-sequence token.
* it writes names that transformers 4 does not know: `TokenizersBackend`, a list in `extra_special_tokens`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub

from relora_ds.utils.files import write_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONFIG_FILE = "tokenizer_config.json"
# Beside those that the tokenizer's own class names: transformers 5 has one class for many vocabularies.
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "spm.model")
_VOCABULARIES = (
    *SENTENCEPIECE,
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tekken.json",
    "tiktoken.model",
)
# What `save_pretrained` adds to a configuration that does not have it and that transformers 5 finds again by itself:
# how the tokenizer happened to be loaded, and defaults. `add_prefix_space` makes transformers 4 rebuild a tokenizer
# from a sentencepiece model, which need not be there.
_ADDED_BY_SAVING = {"backend", "is_local", "local_files_only", "trust_remote_code", "add_prefix_space"}
_GENERIC_CLASS = {"TokenizersBackend": "PreTrainedTokenizerFast"}


def save(tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write `tokenizer` to `directory`, with the vocabulary files of the directory or Hugging Face id it came from.

    One that came from `directory` itself is there.
    """
    source = origin(tokenizer.name_or_path)
    if source is not None and source.resolve() == directory.resolve():
        return
    tokenizer.save_pretrained(directory)
    given = {}
    if source is not None:
        for name in {*_VOCABULARIES, *tokenizer.vocab_files_names.values()} - {"tokenizer.json"}:
            if (source / name).is_file():
                shutil.copyfile(source / name, directory / name)
        if (source / CONFIG_FILE).is_file():
            given = json.loads((source / CONFIG_FILE).read_text(encoding="utf-8"))
    config = json.loads((directory / CONFIG_FILE).read_text(encoding="utf-8"))
    write_text(
        directory / CONFIG_FILE, json.dumps(_config(tokenizer, config, given), indent=2, ensure_ascii=False) + "\n"
    )


def misread(
    directory: Path, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], trust_remote_code: bool = False
) -> str | None:
    """Return a warning where `AutoTokenizer` gives other ids than `tokenizer` for the model in `directory`, else None.

    For some families transformers 5 takes the family's own class, whatever tokenizer_config.json names: Qwen2's turns
    a sentencepiece vocabulary into a byte-level one.
    """
    from transformers import AutoTokenizer

    try:
        found = AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever the tokenizer's class raises: the run and its model are as they should be
        return f"{directory}: AutoTokenizer cannot load the tokenizer: {error}"
    if all(found(text)["input_ids"] == tokenizer(text)["input_ids"] for text in texts):
        return None
    return (
        f"{directory}: AutoTokenizer reads the tokenizer as {type(found).__name__}, because of the model's family, "
        f"and gives other ids than the run trained with; load it with PreTrainedTokenizerFast.from_pretrained"
    )


def _config(tokenizer: PreTrainedTokenizerBase, saved: dict, given: dict) -> dict:
    """Return the tokenizer_config.json: what `save_pretrained` wrote, with the settings of the tokenizer's origin."""
    given = {key: value for key, value in given.items() if key not in ("auto_map", "chat_template")}  # `saved` has them
    config = {key: value for key, value in saved.items() if key not in _ADDED_BY_SAVING} | {
        key: value for key, value in given.items() if key not in _ADDED_BY_SAVING - {"add_prefix_space"}
    }
    name = config.get("tokenizer_class", "")
    config["tokenizer_class"] = _GENERIC_CLASS.get(name, name)
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 4 expects a dict under this name
        named = set(tokenizer.special_tokens_map.values())
        others = [token for token in config.pop("extra_special_tokens") if _text(token) not in named]
        if others:
            config["additional_special_tokens"] = others
    if (added := _added_tokens(tokenizer)) is not None:
        config["add_bos_token"], config["add_eos_token"] = added
    if getattr(tokenizer, "legacy", None) is not None:
        config.setdefault("legacy", tokenizer.legacy)
    return config


def _added_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool] | None:
    """Return whether a call puts BOS before and EOS after a text; None where it adds other tokens, such as [CLS]."""
    text, bos, eos = "a", [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    plain, full = (tokenizer(text, add_special_tokens=special)["input_ids"] for special in (False, True))
    return next(
        (
            added
            for added in ((False, False), (True, False), (False, True), (True, True))
            if bos * added[0] + plain + eos * added[1] == full
        ),
        None,
    )


def _text(token: str | dict) -> str:
    return token["content"] if isinstance(token, dict) else token


def origin(name_or_path: str) -> Path | None:
    """Return the directory with a tokenizer's files; of an id, the one in Hugging Face's cache. None: there is none."""
    if not name_or_path:
        return None
    if Path(name_or_path).is_dir():
        return Path(name_or_path)
    found = (huggingface_hub.try_to_load_from_cache(name_or_path, name) for name in (CONFIG_FILE, "tokenizer.json"))
    return next((Path(path).parent for path in found if isinstance(path, str)), None)
