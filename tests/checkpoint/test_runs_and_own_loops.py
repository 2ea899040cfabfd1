"""A loop of its own and a run read each other's checkpoints, as far as that has a meaning."""

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import relora_ds
from relora_ds.__main__ import main
from relora_ds.checkpoint import manifest
from relora_ds.config import ReLoRAConfig
from tests.checkpoint.weights import weights_in
from tests.parity import cases
from tests.ranks import ranks
from tests.training.runs import run
from tests.zero.test_checkpoint import build, train

# A run of version 0.1: 6 steps at full rank and 11 with low-rank updates, a restart after 8 of these.
RUN_0_1 = Path(__file__).parents[1] / "fixtures" / "v0_1" / "run" / "checkpoints"


def load_a_run(directory: Path) -> tuple[int, list[int], int, dict]:
    about = manifest.read(directory / "step_00000017").model["relora"]
    relora = ReLoRAConfig(**{f.name: about[f.name] for f in dataclasses.fields(ReLoRAConfig) if f.name in about})
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory / "step_00000017"))
    engine, *_ = relora_ds.initialize(
        model=relora_ds.wrap(model, relora),
        config=cases.ds_settings(2, "fp32"),
        relora=relora,
        lr=1e-3,
        total_steps=24,
        precision="fp32",
        micro_batch_size=2,
    )
    _, client_state = engine.load_checkpoint(str(directory))
    found = engine.t, list(engine.restarts), client_state["account"]["step"], engine.collect_merged()
    cases.release(engine)
    return found


def test_a_loop_of_its_own_loads_a_run_of_version_0_1():
    t, restarts, step, merged = ranks(1).run(load_a_run, RUN_0_1)[0]
    assert (t, restarts, step) == (11, [8], 17)
    saved = weights_in(RUN_0_1 / "step_00000017")
    assert merged.keys() == saved.keys() and all(torch.equal(merged[name], saved[name]) for name in saved)


def save(directory: str) -> None:
    engine = build(1, "fp32")
    train(engine, 0, 5)
    engine.save_checkpoint(directory)
    cases.release(engine)


def test_a_run_does_not_resume_from_a_loop_of_its_own(tmp_path):
    ranks(2).run(save, str(tmp_path / "own"))
    with pytest.raises(AssertionError, match=r"is of a loop of its own .* init_from=PATH"):
        run(tmp_path / "r", f"resume={tmp_path / 'own' / 'global_step5'}")


def test_the_command_lists_and_verifies_a_loop_of_its_own(tmp_path, capsys):
    ranks(2).run(save, str(tmp_path))
    assert main(["checkpoint", "list", str(tmp_path)]) == 0
    _, row = (line.split() for line in capsys.readouterr().out.splitlines())
    assert row[:2] == ["global_step5", "1"]
    assert main(["checkpoint", "verify", str(tmp_path)]) == 0
    (tmp_path / "global_step5" / "trained_00000.safetensors").unlink()
    assert main(["checkpoint", "verify", str(tmp_path / "global_step5")]) == 1
    assert "trained_00000.safetensors is missing" in capsys.readouterr().out
