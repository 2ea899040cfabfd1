"""A run with document masks: it trains and evaluates with them, so does `relora eval`, and a resume may drop them."""

import json

import pytest
from transformers import BloomConfig, BloomForCausalLM

from relora_ds.__main__ import main
from relora_ds.checkpoint import manifest
from relora_ds.config import load_recipe
from relora_ds.data import prepare
from relora_ds.training import compatibility
from relora_ds.training.preflight import check
from tests.training.runs import losses, run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "masked"
    return directory, run(directory, "data.packing=masked", "train.steps=16", "relora.restart_every=null")


def test_it_trains_and_evaluates_with_masks(finished):
    directory, summary = finished
    data = prepare(load_recipe(directory / "recipe.yaml").data)
    documents = int((data.validation == data.eos_id).sum())
    assert documents > 1 and summary["val_tokens"] == len(data.validation) - documents
    found = losses(directory)
    assert len(found) == 16 and found[16] < found[1] - 0.5


def test_its_export_has_its_loss(finished, capsys):
    """The export has a cache of keys and values, with which transformers would not look for documents."""
    directory, summary = finished
    capsys.readouterr()
    assert main(["eval", str(directory / "export"), "--json", "--data", str(directory)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["val_tokens"] == summary["val_tokens"]
    assert found["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-6)


def test_a_resume_may_change_them_and_says_so(finished):
    directory, _ = finished
    saved = manifest.read(directory / "checkpoints" / "step_00000016")
    plan = check(str(directory / "recipe.yaml"), ["data.packing=true", "resume=auto"])
    compatibility.require_same_run(saved, plan)
    assert "resume: data.packing was masked, is True" in compatibility.changes(saved, plan)


def test_a_model_that_cannot_be_evaluated_with_masks_is_refused(finished, tmp_path, capsys):
    directory, _ = finished
    BloomForCausalLM(BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=512)).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((directory / "export" / name).read_bytes())
    assert main(["eval", str(tmp_path), "--data", str(directory)]) == 1
    assert "data.packing: masked does not fit transformers' bloom models" in capsys.readouterr().err
