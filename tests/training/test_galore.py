"""Runs of one-sided chains: from tokens to the export, and a run of another kind that goes on as one."""

import pytest
from safetensors.torch import load_file

from tests.training.runs import lines, losses, run

GALORE = ("method=galore", "relora.restart_every=10", "relora.restart_warmup_steps=0", "relora.optimizer_reset=rotate")
WARM_SKETCH = "relora.gradient_estimate=warm_sketch"


@pytest.fixture(scope="module")
def relora(tmp_path_factory):
    directory = tmp_path_factory.mktemp("relora") / "run"
    run(directory, "checkpoint.every=5", "checkpoint.keep_last=99")
    return directory


def test_from_tokens_to_the_export(tmp_path):
    summary = run(tmp_path / "r", *GALORE, WARM_SKETCH, "warm_start_steps=0")
    restarts = lines(tmp_path / "r", "restart")
    assert [line["restarts"] for line in restarts] == [1, 2, 3] == [*range(1, summary["restarts"] + 1)]
    assert all(line["subspace_bytes"] > 0 and line["merge_drift"] < 1e-5 for line in restarts)
    found = losses(tmp_path / "r")
    assert found[40] < found[1] - 0.2
    weights = load_file(tmp_path / "r" / "export" / "model.safetensors")
    assert not [name for name in weights if "lora" in name]
    both = 75_712 - summary["trainable_parameters"]
    assert both == 2 * 4 * (64 * 4 + 64 * 2 + 176), "what is frozen: A of q, k, v, o, gate, up and down in two layers"


def test_it_goes_on_from_a_restart_of_relora(relora, tmp_path):
    run(tmp_path / "r", *GALORE, f"resume={relora}/checkpoints/step_00000020")
    assert [line["step"] for line in lines(tmp_path / "r", "restart")] == [30]
    assert min(losses(tmp_path / "r")) == 21 and losses(tmp_path / "r")[21] == losses(relora)[21], "B = 0: the same W"


def test_within_a_cycle_it_names_the_step_to_resume_from(relora, tmp_path):
    with pytest.raises(AssertionError, match="trains was both, is B.*resume from step 20"):
        run(tmp_path / "r", *GALORE, f"resume={relora}/checkpoints/step_00000025")
