"""A CR-Net leaves as a directory that loads with relora_ds, and without it from the code beside the weights."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import relora_ds
from relora_ds.architectures import ReLoRACRNetForCausalLM
from relora_ds.interop.hf_export import export
from relora_ds.models import recompute
from tests.interop.test_cola_export import TRUSTED, elsewhere
from tests.parity import cases
from tests.ranks import ranks
from tests.small_models import batch, crnet


def own_loop(directory: str, stage: int, mode: str) -> torch.Tensor:
    """On a rank: train a little without our trainer, save, and return the logits of a batch."""
    model = recompute.apply(crnet(num_key_value_heads=1), mode)
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
    assert {path.name for path in directory.iterdir()} >= {"config.json", "model.safetensors", "relora_crnet.py"}
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    assert config["auto_map"] == {
        "AutoConfig": "relora_crnet.ReLoRACRNetConfig",
        "AutoModelForCausalLM": "relora_crnet.ReLoRACRNetForCausalLM",
    }
    here = AutoModelForCausalLM.from_pretrained(directory).eval()
    assert type(here) is ReLoRACRNetForCausalLM and type(AutoConfig.from_pretrained(directory)) is type(here.config)
    assert not any((module.beta == 1).all() for module in here.modules() if hasattr(module, "beta"))
    with torch.no_grad():
        torch.testing.assert_close(here(input_ids=ids).logits, trained, rtol=1e-5, atol=1e-6)
    there = elsewhere(directory, ids, tmp_path)
    assert there["known"] == [] and there["module"].startswith("transformers_modules.")
    torch.testing.assert_close(torch.tensor(there["logits"]), trained, rtol=1e-5, atol=1e-6)
    assert there["new"] == ids.shape[1] + 4
    export(tmp_path / "mine", tmp_path / "exported")
    before, after = (load_file(place / "model.safetensors") for place in (directory, tmp_path / "exported"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "exported" / "relora_crnet.py").read_bytes() == (directory / "relora_crnet.py").read_bytes()
    assert TRUSTED in (tmp_path / "exported" / "README.md").read_text(encoding="utf-8")


def test_it_needs_no_trust_where_the_room_is_imported(tmp_path):
    crnet().save_pretrained(tmp_path)
    load = (
        "import relora_ds.architectures\nfrom transformers import AutoModelForCausalLM\n"
        f"print(type(AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})).__module__)"
    )
    done = subprocess.run([sys.executable, "-c", load], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["relora_ds.architectures.relora_crnet"]
