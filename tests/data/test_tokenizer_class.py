"""A model's family does not decide how its tokenizer reads; the tokenizer's own files do."""

import json

import pytest
from tokenizers import Tokenizer
from transformers import Qwen2Tokenizer

from relora_ds.data import tokenizer as tokenizers
from relora_ds.data import tokenizer_files
from tests.data.test_tokenizer_files import LLAMA, TEXTS, byte_level, sentencepiece_directory


def beside(family: str, directory):
    (directory / "config.json").write_text(json.dumps({"model_type": family}))
    return directory


@pytest.mark.parametrize("family", ["qwen2", "qwen3_5"])
def test_a_family_with_a_class_of_its_own_keeps_a_sentencepiece_vocabulary(tmp_path, family):
    source = sentencepiece_directory(tmp_path / "mine", config={**LLAMA, "legacy": False})
    given = tokenizers.load(source)
    expected = tokenizers.encode(given, TEXTS)
    tokenizer_files.save(given, tmp_path / "export")
    for directory in (tmp_path / "export", source):  # with tokenizer.json, and with tokenizer.model alone
        found = tokenizers.load(beside(family, directory))
        assert tokenizers.encode(found, TEXTS) == expected
        assert (found.eos_token_id, len(found)) == (given.eos_token_id, len(given))
    tokenizer_files.save(found, tmp_path / "again")  # a checkpoint's copy, without config.json
    assert tokenizers.encode(tokenizers.load(tmp_path / "again"), TEXTS) == expected


@pytest.mark.parametrize("declared", ["GPT2Tokenizer", "LlamaTokenizerFast"])
def test_a_vocabulary_of_the_family_stays_as_tokenizer_json_has_it(tmp_path, declared):
    """Published models of these families name a class that is not theirs."""
    model = json.loads(byte_level(False).to_str())["model"]
    Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        eos_token="<|end|>",
        unk_token=None,
        pad_token="<|end|>",
    ).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": declared}))
    found = tokenizers.load(beside("qwen2", tmp_path))
    exact = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert tokenizers.encode(found, TEXTS) == [exact.encode(text, add_special_tokens=False).ids for text in TEXTS]
