"""`python -m relora_ds eval`: a run's export on the run's data has the run's loss, and any text has its own."""

import json
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from relora_ds.__main__ import main
from relora_ds.interop.hf_export import export
from tests.training.runs import lines, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "finished"
    summary = run(directory, "checkpoint.every=10", "train.steps=16")
    return directory, summary


@pytest.fixture
def evaluate(capsys):
    def figures(model, *arguments: str) -> dict:
        capsys.readouterr()
        assert main(["eval", str(model), "--json", "--data", *map(str, arguments)]) == 0
        return json.loads(capsys.readouterr().out)

    return figures


def test_the_runs_loss_on_the_runs_data(finished, tmp_path, evaluate):
    directory, summary = finished
    export(directory, tmp_path / "peft", format="peft")
    for model in (directory, directory / "export", tmp_path / "peft"):
        found = evaluate(model, directory)
        for name in ("val_loss", "ppl", "word_ppl", "bits_per_byte"):
            # word_ppl is an exponential of a thousand times the loss' last digits
            assert found[name] == pytest.approx(summary[name], rel=1e-3 if name == "word_ppl" else 1e-6), name
        assert found["val_tokens"] == summary["val_tokens"] and found["seq_len"] == 64
    # a checkpoint, by the recipe and by the corpus' name
    [at_10] = [line for line in lines(directory, "eval") if line["step"] == 10]
    tag = directory / "checkpoints" / "step_00000010"
    assert evaluate(tag, "tiny")["val_loss"] == pytest.approx(at_10["val_loss"], rel=1e-6)
    assert evaluate(tag, "pydocs", "data.seq_len=64")["val_loss"] == pytest.approx(at_10["val_loss"], rel=1e-6)


def test_batch_size_does_not_matter_and_dtype_does_a_little(finished, evaluate):
    directory, summary = finished
    assert evaluate(directory, "tiny", "--batch-size", 3)["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    found = evaluate(directory, "tiny", "--dtype", "bf16")
    assert 0 < abs(found["val_loss"] - summary["val_loss"]) < 0.01 and found["dtype"] == "bf16"


def test_a_file_of_ones_own(finished, tmp_path, evaluate):
    """Against the definition, token by token: one document a file, EOS behind it."""
    directory, _ = finished
    text = "The value of an expression list is a tuple.\nNo more than that, and no less.\n"
    (tmp_path / "a.txt").write_text(text)
    found = evaluate(directory / "export", tmp_path / "a.txt", "--seq-len", 512)
    tokenizer = AutoTokenizer.from_pretrained(directory / "export")
    ids = torch.tensor([*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(directory / "export").eval()(input_ids=ids[None]).logits[0]
    nats = F.cross_entropy(logits[:-1].double(), ids[1:]).item()
    assert found["val_loss"] == pytest.approx(nats, rel=1e-6) and found["val_tokens"] == len(ids) - 1
    whole = nats * len(ids)
    assert found["bits_per_byte"] == pytest.approx(whole / math.log(2) / len(text.encode()), rel=1e-6)
    assert found["word_ppl"] == pytest.approx(math.exp(whole / len(text.split())), rel=1e-3)
    # the same text as a line of JSON, in a column of another name
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": text}) + "\n")
    assert evaluate(directory, tmp_path / "a.jsonl", "data.text_column=body", "--seq-len", 512) == found


def test_a_foreign_tokenizer_counts_words_and_bytes_alike(finished, tmp_path, evaluate):
    """bits per byte and word perplexity can be compared between vocabularies; the loss per token cannot."""
    directory, summary = finished
    run(tmp_path / "other", "data.vocab_size=400", "train.steps=16")
    found = evaluate(tmp_path / "other", directory)
    assert found["val_tokens"] > summary["val_tokens"]
    assert abs(found["bits_per_byte"] / summary["bits_per_byte"] - 1) < 0.2


def test_the_table(finished, capsys):
    directory, summary = finished
    assert main(["eval", str(directory), "--data", "tiny"]) == 0
    printed = capsys.readouterr().out
    assert "64 tokens of context" in printed and "bits per byte" in printed
    [loss] = [float(line.split()[-1]) for line in printed.splitlines() if "nats per token" in line]
    assert loss == pytest.approx(summary["val_loss"], abs=1e-5)


def test_mistakes_are_one_line(finished, tmp_path, capsys):
    directory, _ = finished
    (tmp_path / "empty.txt").touch()
    (tmp_path / "no_tokenizer").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "no_tokenizer" / name).write_bytes((directory / "export" / name).read_bytes())
    for arguments, message in (
        (["./none", "--data", "tiny"], "DIR_OR_ID: ./none is no directory"),
        ([tmp_path, "--data", "tiny"], "neither a run, a checkpoint, a Hugging Face model nor a PEFT export"),
        ([tmp_path / "no_tokenizer", "--data", "tiny"], "cannot be loaded"),
        ([directory, "--data", "./none.txt"], "--data: './none.txt' does not exist"),
        ([directory, "--data", tmp_path / "empty.txt"], "holds only empty files"),
        ([directory, "--data", "tiny", "--seq-len", "5000"], "--seq-len: 5000 is not between 2 and the model's"),
        ([directory, "--data", "tiny", "--batch-size", "0"], "--batch-size: 0"),
        ([directory], "--data and --tasks: neither is given"),
        ([directory, "--data", "tiny", "--task-files", tmp_path], "without --tasks; name those to evaluate"),
        ([tmp_path / "no_tokenizer", "--tasks", "hellaswag"], "cannot be loaded"),
    ):
        assert main(["eval", *map(str, arguments)]) == 1, arguments
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1, printed
    assert main(["eval", str(directory), "--data", "tiny", "data.sequence=5"]) == 2
    assert "data.sequence" in capsys.readouterr().err
