"""A CoLA network leaves as a directory that loads with relora_ds, and without it from the code beside the weights."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import relora_ds
from relora_ds.__main__ import main
from relora_ds.architectures import ReLoRACoLAForCausalLM
from relora_ds.config import RecipeError, load_recipe
from relora_ds.interop.hf_export import export
from relora_ds.models.pretrained_weights import StoredWeights, pretrained_weights
from relora_ds.training.hooks.console import Console
from relora_ds.training.preflight import check
from tests.parity import cases
from tests.ranks import ranks
from tests.small_models import batch, cola, llama
from tests.training.runs import run

TRUSTED = 'from_pretrained("DIRECTORY", trust_remote_code=True)'
# In a process of its own: what the exported code computes, where nothing of relora_ds is imported.
ELSEWHERE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
ids = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    logits = model(input_ids=ids).logits
mask = torch.ones_like(ids[:1])
new = model.generate(ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=0, attention_mask=mask)
known = sorted(name for name in sys.modules if name.partition(".")[0] == "relora_ds")
print(json.dumps({"logits": logits.tolist(), "new": new.shape[1], "known": known, "module": type(model).__module__}))
"""


def elsewhere(directory, ids: torch.Tensor, cache) -> dict:
    """What a user without relora_ds gets from an export."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", ELSEWHERE, str(directory), json.dumps(ids.tolist())]
    done = subprocess.run(command, cwd=cache, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def own_loop(directory: str, stage: int, mode: str) -> torch.Tensor:
    """On a rank: train a little without our trainer, save, and return the logits of a batch."""
    from relora_ds.models import recompute

    model = recompute.apply(cola(hidden_act="linear"), mode)
    engine, *_ = relora_ds.initialize(model, f"zero{stage}", lr=1e-2, total_steps=9, precision="fp32")
    for step in range(3):
        cases.train_step(engine, step)
    logits = cases.logits(engine)
    engine.save_merged(f"{directory}/merged")
    engine.save_checkpoint(directory, tag="mine")
    cases.release(engine)
    return logits


@pytest.mark.parametrize("stage, mode", [(3, "low_rank"), pytest.param(1, "none", marks=pytest.mark.slow)])
def test_the_export_is_the_trained_network_with_and_without_relora_ds(tmp_path, stage, mode):
    trained = ranks(2).run(own_loop, str(tmp_path), stage, mode)[0]
    directory, ids = tmp_path / "merged", batch(999, 4)
    assert {path.name for path in directory.iterdir()} >= {"config.json", "model.safetensors", "relora_cola.py"}
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"] == {
        "AutoConfig": "relora_cola.ReLoRACoLAConfig",
        "AutoModelForCausalLM": "relora_cola.ReLoRACoLAForCausalLM",
    }
    here = AutoModelForCausalLM.from_pretrained(directory).eval()
    assert type(here) is ReLoRACoLAForCausalLM and type(AutoConfig.from_pretrained(directory)) is type(here.config)
    with torch.no_grad():
        torch.testing.assert_close(here(input_ids=ids).logits, trained, rtol=1e-5, atol=1e-6)
    there = elsewhere(directory, ids, tmp_path)
    assert there["known"] == [] and there["module"].startswith("transformers_modules.")
    torch.testing.assert_close(torch.tensor(there["logits"]), trained, rtol=1e-5, atol=1e-6)
    assert there["new"] == ids.shape[1] + 4
    export(tmp_path / "mine", tmp_path / "exported")
    before, after = (load_file(place / "model.safetensors") for place in (directory, tmp_path / "exported"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "exported" / "relora_cola.py").read_bytes() == (directory / "relora_cola.py").read_bytes()
    assert TRUSTED in (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cola") / "run"
    settings = ("method=cola", "cola.r=8", "warm_start_steps=0", "train.steps=12", "checkpoint.every=6")
    return directory, run(directory, *settings, world_size=1)


def test_a_run_and_its_checkpoints_are_evaluated_exported_and_loaded(finished, tmp_path, capsys):
    """No code of the run's directory is run for that: `trust_remote_code` stays off."""
    directory, summary = finished
    assert main(["export", str(directory), str(tmp_path / "bf16"), "--dtype", "bf16"]) == 0
    assert capsys.readouterr().out.endswith("AutoModelForCausalLM.from_pretrained, trust_remote_code=True\n")
    export(directory, tmp_path / "step_6", checkpoint="step_00000006")
    for place, words in ((directory, 0), (directory / "checkpoints" / "step_00000012", 0), (tmp_path / "bf16", 0.01)):
        capsys.readouterr()
        assert main(["eval", str(place), "--json", "--data", str(directory)]) == 0
        found = json.loads(capsys.readouterr().out)["val_loss"]
        assert found == pytest.approx(summary["val_loss"], rel=words or 1e-6), place
    merged = relora_ds.load_run(directory).merged()
    assert type(merged) is ReLoRACoLAForCausalLM and merged.config.cola_r == 8 and merged.config.use_cache
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "bf16").dtype == torch.bfloat16
    assert (tmp_path / "step_6" / "relora_cola.py").is_file()
    assert TRUSTED in (directory / "export" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("model, trust", [(llama, ""), (cola, ", trust_remote_code=True")])
def test_the_last_line_of_a_run_says_how_its_model_is_loaded(model, trust):
    console, said = Console(), []
    console._terminal = SimpleNamespace(close=lambda: None, table=lambda *table: None, line=said.append)
    engine, recipe = SimpleNamespace(module=model()), load_recipe("tiny")
    about = {"verdict": "", "trainable_parameters": 1, "total_parameters": 1, "seconds": 0}
    console.on_end(SimpleNamespace(history=[], run_dir=Path("r"), recipe=recipe, engine=engine), about)
    assert said[-1].startswith(f"model: r/export (AutoModelForCausalLM.from_pretrained{trust})")


def test_a_peft_adapter_is_refused(finished, tmp_path):
    with pytest.raises(ValueError, match="its method has no low-rank updates"):
        export(finished[0], tmp_path / "peft", format="peft")


def test_a_recipe_of_another_architecture_does_not_begin_with_its_weights(finished, tmp_path):
    with pytest.raises(RecipeError, match="holds a relora_cola model, and the recipe's is a llama; export it"):
        check("tiny", ["method=full", "warm_start_steps=0", f"init_from={finished[0]}", f"run_dir={tmp_path / 'r'}"])


def test_an_export_goes_on_as_an_ordinary_model(finished, tmp_path):
    """The remedy that `cola` names for pretrained weights. They are read one tensor at a time."""
    directory, summary = finished
    config = AutoConfig.from_pretrained(directory / "export")
    assert isinstance(pretrained_weights(directory / "export", config, False), StoredWeights)
    model = ["model.preset=null", f"model.name_or_path={directory / 'export'}", "model.init=pretrained"]
    tokenizer = f"data.tokenizer={directory / 'export'}"
    settings = ["method=full", "warm_start_steps=0", "train.steps=6", "optim.warmup_steps=1", *model, tokenizer]
    again = run(tmp_path / "r", *settings, world_size=1)
    assert again["val_loss"] < summary["val_loss"]
    assert (tmp_path / "r" / "export" / "relora_cola.py").is_file()
