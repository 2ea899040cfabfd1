"""The files that other programs need to give the ids that the run trained with."""

import json
from pydoc_data.topics import topics

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from relora_ds.data import tokenizer as tokenizers
from relora_ds.data import tokenizer_files

TEXTS = [topics[key][:1000] for key in sorted(topics)[:60]]
LLAMA = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def sentencepiece_directory(directory, name="tokenizer.model", config=LLAMA, **training):
    """A directory as models are published with: a sentencepiece model and a configuration."""
    directory.mkdir()
    options = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 500, "minloglevel": 2, **training}
    lines = (line for text in TEXTS for line in text.split("\n") if line.strip())
    with open(directory / name, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=file, **options)
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def byte_level(bos: bool) -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<|begin|>", "<|end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<|begin|> $A", special_tokens=[("<|begin|>", 0)])
    return backend


def saved(source, directory) -> dict:
    """The configuration in `directory` after the tokenizer of `source` was saved there, which gives the same ids."""
    given = tokenizers.load(str(source))
    tokenizer_files.save(given, directory)
    again = AutoTokenizer.from_pretrained(directory)
    for special in (False, True):
        assert (
            again(TEXTS, add_special_tokens=special)["input_ids"]
            == given(TEXTS, add_special_tokens=special)["input_ids"]
        )
    return json.loads((directory / "tokenizer_config.json").read_text())


def test_a_trained_tokenizer_keeps_its_sentencepiece_model(tmp_path):
    tokenizers.train(TEXTS, 600, tmp_path / "trained")
    for source, directory in (("trained", "run"), ("run", "again")):  # a tokenizer may come from an export
        config = saved(tmp_path / source, tmp_path / directory)
        assert (tmp_path / directory / "tokenizer.model").read_bytes() == (
            tmp_path / "trained" / "tokenizer.model"
        ).read_bytes()
        assert (tmp_path / directory / "tokenizer.json").is_file()
        assert {name: config.get(name) for name in ("add_bos_token", "add_eos_token", "legacy")} == {
            "add_bos_token": False,
            "add_eos_token": False,
            "legacy": False,
        }
        assert config["tokenizer_class"] == "LlamaTokenizer" and "extra_special_tokens" not in config
        assert not {"backend", "is_local", "local_files_only"} & set(config)


@pytest.mark.parametrize("bos, eos", [(True, False), (False, True), (False, False)])
def test_a_users_sentencepiece_model_and_settings_are_kept(tmp_path, bos, eos):
    added = {"add_bos_token": bos, "add_eos_token": eos}
    source = sentencepiece_directory(tmp_path / "mine", config={**LLAMA, **added})
    config = saved(source, tmp_path / "export")
    assert (tmp_path / "export" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    assert {name: config[name] for name in added} == added
    assert "add_prefix_space" not in config  # transformers 4 would build another tokenizer


def test_what_a_tokenizer_adds_is_said_where_its_files_leave_it_to_the_reader(tmp_path):
    """transformers 5 adds no BOS here, transformers 4 and llama.cpp would."""
    config = saved(sentencepiece_directory(tmp_path / "mine"), tmp_path / "export")
    assert config["add_bos_token"] is False and config["legacy"] is False


def test_a_t5_vocabulary_keeps_its_name(tmp_path):
    source = sentencepiece_directory(
        tmp_path / "t5",
        "spiece.model",
        {"tokenizer_class": "T5Tokenizer", "extra_ids": 10},
        model_type="unigram",
        byte_fallback=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    config = saved(source, tmp_path / "export")
    assert (tmp_path / "export" / "spiece.model").read_bytes() == (source / "spiece.model").read_bytes()
    assert not (tmp_path / "export" / "tokenizer.model").exists()
    assert config["add_eos_token"] is True and config["tokenizer_class"] == "T5Tokenizer"
    assert "<extra_id_9>" in config["additional_special_tokens"]


@pytest.mark.parametrize("bos", [False, True])
def test_the_class_is_one_that_transformers_4_has(tmp_path, bos):
    (tmp_path / "mine").mkdir()
    byte_level(bos).save(str(tmp_path / "mine" / "tokenizer.json"))
    (tmp_path / "mine" / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|begin|>", "eos_token": "<|end|>"})
    )
    config = saved(tmp_path / "mine", tmp_path / "export")
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast" and config["add_bos_token"] is bos


def test_a_byte_level_vocabulary_keeps_its_files(tmp_path):
    (tmp_path / "gpt2").mkdir()
    byte_level(False).model.save(str(tmp_path / "gpt2"))
    (tmp_path / "gpt2" / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<|end|>", "eos_token": "<|end|>", "unk_token": "<|end|>"}
        )
    )
    saved(tmp_path / "gpt2", tmp_path / "export")
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "export" / name).read_bytes() == (tmp_path / "gpt2" / name).read_bytes()


def test_files_of_a_hugging_face_id_come_from_its_cache(tmp_path, monkeypatch):
    snapshot = tmp_path / "cache" / "models--someone--tokenizer" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    source = sentencepiece_directory(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    given = tokenizers.load(str(source))
    given.name_or_path = "someone/tokenizer"
    tokenizer_files.save(given, tmp_path / "export")
    assert (tmp_path / "export" / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()


def test_a_tokenizer_without_files_is_saved(tmp_path, monkeypatch):
    """And takes nothing from the directory where the process happens to run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    given = PreTrainedTokenizerFast(tokenizer_object=byte_level(True), bos_token="<|begin|>", eos_token="<|end|>")
    tokenizer_files.save(given, tmp_path / "export")
    assert AutoTokenizer.from_pretrained(tmp_path / "export")("a b")["input_ids"] == given("a b")["input_ids"]
    assert not (tmp_path / "export" / "vocab.json").exists()


@pytest.mark.parametrize("family, is_misread", [("llama", False), ("gpt_neox", False), ("qwen2", True)])
def test_a_family_whose_own_class_reads_other_ids_is_named(tmp_path, family, is_misread):
    trained = tokenizers.train(TEXTS, 600, tmp_path / "trained")
    tokenizer_files.save(trained, tmp_path / "export")
    (tmp_path / "export" / "config.json").write_text(json.dumps({"model_type": family}))
    problem = tokenizer_files.misread(tmp_path / "export", trained, ["Hello world"])
    assert ("as Qwen2Tokenizer" in (problem or "")) == is_misread
    remedy = PreTrainedTokenizerFast.from_pretrained(tmp_path / "export")
    assert remedy(TEXTS)["input_ids"] == trained(TEXTS)["input_ids"]
