"""Everything wrong with the `data.` section that can be seen without a download and without reading a corpus."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from relora_ds.config.validate import DATA_SOURCES, source_problem
from relora_ds.data import corpora, hub, localfiles, pretokenized
from relora_ds.data.cache import cache_root

if TYPE_CHECKING:
    from relora_ds.config import DataConfig


def problems(data: DataConfig) -> list[str]:
    """What is wrong with the settings, one message each; [] when `prepare` can start."""
    found = [problem for problem in (source_problem(data.source),) if problem]
    if not found:
        found += _source_problems(data)
    found += _errors_of(corpora.validation_setting, data)
    if _names_validation_files(data):
        found += _errors_of(localfiles.find, data.validation, "data.validation")
    if data.source != "pretokenized":
        found += _tokenizer_problems(data)
    if not _is_int(data.seq_len) or data.seq_len < 2:
        found.append(f"data.seq_len: {data.seq_len!r} is not a whole number of at least 2 tokens, such as 256")
    elif data.max_tokens is not None and (not _is_int(data.max_tokens) or data.max_tokens < data.seq_len):
        found.append(
            f"data.max_tokens: {data.max_tokens!r} does not hold one sequence of data.seq_len "
            f"{data.seq_len}; raise it or remove it"
        )
    if cache_root(data).exists() and not cache_root(data).is_dir():
        found.append(f"data.cache_dir: {str(cache_root(data))!r} is not a directory; name one")
    return list(dict.fromkeys(found))


def _source_problems(data: DataConfig) -> list[str]:
    """What the source makes of path, text_column and max_tokens."""
    found = []
    if data.source in ("wikitext2", "pydocs", "gutenberg") and data.text_column != "text":
        found.append(f"data.text_column: {data.text_column!r} has no effect on {data.source!r}; remove it")
    if data.source == "c4" and data.max_tokens is None:
        found.append(
            "data.max_tokens: missing; c4 is hundreds of gigabytes and is streamed until so many tokens are "
            "there; set it, e.g. data.max_tokens=1000000000"
        )
    if data.source == "text":
        found += _errors_of(corpora.text_files, data)
    elif data.source == "pretokenized":
        found += _errors_of(pretokenized.read_metadata, data.path)
    elif data.source == "c4" and data.path:
        found += _errors_of(hub.c4_shards, data.path, data.config or hub.C4_CONFIG, data.split)
    elif data.path:
        found.append(
            f"data.path: {data.path!r} is not read with data.source={data.source}; set data.source=text, or "
            f"remove data.path"
        )
    elif (
        corpora.is_datasets_id(data.source)
        and str(data.source).startswith((".", "/", "~"))
        and not hub.is_local(data.source)
    ):
        found.append(
            f"data.source: {data.source!r} does not exist; correct the path, or use one of "
            f"{', '.join(DATA_SOURCES)} or org/name"
        )
    return found


def _tokenizer_problems(data: DataConfig) -> list[str]:
    if data.tokenizer is None:
        # 256 bytes and the four special tokens; whether the corpus' characters fit too is known after reading it.
        if not _is_int(data.vocab_size) or data.vocab_size <= 260:
            return [
                f"data.vocab_size: {data.vocab_size!r} is not a whole number above 260 (256 bytes and 4 special "
                f"tokens), such as 8192"
            ]
        return []
    name = str(data.tokenizer)
    place = Path(name).expanduser()
    # "gpt2" and "org/name" may be names on the hub; these cannot.
    only_a_path = name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1
    if place.is_file() or (only_a_path and not place.exists()):
        return [f"data.tokenizer: {name!r} is not a directory; give a tokenizer's directory or a Hugging Face id"]
    return []


def _errors_of(function: Callable, *arguments: object) -> list[str]:
    try:
        function(*arguments)
    except ValueError as error:
        return [str(error)]
    return []


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _names_validation_files(data: DataConfig) -> bool:
    try:
        return data.source != "pretokenized" and isinstance(corpora.validation_setting(data), str)
    except ValueError:
        return False
