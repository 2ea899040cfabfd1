"""The `data.` section as the tests need it: offline, small, everything inside the test's own directory."""

from pathlib import Path

from relora_ds.config import DataConfig


def settings(cache_dir: Path, **changes) -> DataConfig:
    fields = {
        "source": "pydocs",
        "path": None,
        "config": None,
        "split": "train",
        "text_column": "text",
        "validation": None,
        "max_tokens": None,
        "tokenizer": None,
        "vocab_size": 600,
        "seq_len": 32,
        "packing": True,
        "cache_dir": str(cache_dir),
        "mix": None,
        "validation_sets": None,
        "deduplicate": None,
    }
    assert not changes.keys() - fields.keys(), changes
    return DataConfig(**{**fields, **changes})


def write_text(path: Path, num_lines: int, word: str = "word") -> Path:
    """A file of numbered lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (
        f"{word} {number} of the {number * 7919 % 10007:x}th line goes over hill {number % 13}"
        for number in range(num_lines)
    )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
