"""A whole run: what it does, what it leaves, and that it does it again to the last digit."""

import contextlib
import io
import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from relora_ds import data
from relora_ds.config import load_recipe
from relora_ds.interop.hf_export import export
from relora_ds.lowrank.schedule import lr_multiplier
from relora_ds.training.validation import evaluate
from tests.ranks import ranks
from tests.training.runs import lines, losses, run, status, train

TRAIN_KEYS = {
    "loss",
    "lr",
    "grad_norm",
    "tokens",
    "tokens_per_s",
    "step_s",
    "mfu",
    "bytes_payload",
    "bytes_wire",
    "peak_memory_bytes",
    "restarts",
}
RESTART_KEYS = {
    "restarts",
    "prune_fraction_m",
    "prune_fraction_v",
    "merge_drift",
    "merge_loss",
    "restart_s",
    "checksum",
}
EVAL_KEYS = {"val_loss", "val_tokens", "ppl", "word_ppl", "bits_per_byte"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(run directory, summary) of one complete tiny run on two ranks."""
    directory = tmp_path_factory.mktemp("runs") / "finished"
    return directory, run(directory)


def test_the_run_directory_is_the_contract(finished):
    directory, summary = finished
    assert {p.name for p in directory.iterdir()} == {
        "recipe.yaml",
        "status.json",
        "metrics.jsonl",
        "summary.json",
        "tensorboard",
        "checkpoints",
        "export",
        "lock",
    }
    assert status(directory)["state"] == "done" and status(directory)["exit_code"] == 0
    assert status(directory)["step"] == 40
    assert json.loads((directory / "summary.json").read_text()) == summary
    assert (directory / "checkpoints" / "latest").read_text() == "step_00000040"
    assert load_recipe(str(directory / "recipe.yaml")).total_steps == 40
    assert {"config.json", "model.safetensors", "generation_config.json", "tokenizer_config.json", "README.md"} <= {
        p.name for p in (directory / "export").iterdir()
    }


def test_metrics_hold_every_field_of_the_contract(finished):
    directory, _ = finished
    common = {"kind", "step", "t", "phase", "time"}
    for kind, keys in (
        ("train", TRAIN_KEYS),
        ("restart", RESTART_KEYS),
        ("eval", EVAL_KEYS),
        ("checkpoint", {"bytes", "stall_s", "write_s"}),
        ("phase", set()),
    ):
        found = lines(directory, kind)
        assert found and all(common | keys <= set(line) for line in found), kind
    assert [line["step"] for line in lines(directory, "train")] == list(range(1, 41))


def test_phases_restarts_and_learning_rate_follow_the_recipe(finished):
    directory, summary = finished
    assert [(p["step"], p["phase"]) for p in lines(directory, "phase")] == [(0, "warm_start"), (10, "relora")]
    restarts = lines(directory, "restart")
    assert [(r["step"], r["t"]) for r in restarts] == [(20, 10), (30, 20)]
    assert all(abs(r["prune_fraction_m"] - 0.99) < 5e-3 and r["merge_drift"] < 5e-6 for r in restarts)
    assert summary["restarts"] == 2
    for line in lines(directory, "train"):
        if line["phase"] == "warm_start":
            expected = lr_multiplier(line["step"] - 1, total_steps=40, warmup_steps=2, min_lr_ratio=0.1)
        else:
            assert line["t"] == line["step"] - 10
            expected = lr_multiplier(
                line["t"] - 1,
                total_steps=30,
                warmup_steps=2,
                restart_every=10,
                restart_warmup_steps=2,
                min_lr_ratio=0.1,
            )
        assert line["lr"] == pytest.approx(5e-3 * expected, abs=1e-15)


def test_it_learns_and_the_updates_after_a_restart_stay_small(finished):
    directory, _ = finished
    values = [e["val_loss"] for e in lines(directory, "eval")]
    assert len(values) == 4 and values == sorted(values, reverse=True)
    sizes = [line["max_update_over_lr"] for line in lines(directory, "train") if "max_update_over_lr" in line]
    # In ordinary training |Δp|/lr is about 1. A reset that keeps m and zeroes v shows here with 10⁵.
    assert len(sizes) == 19 and max(sizes) < 4


def test_bytes_shrink_with_what_trains(finished):
    directory, summary = finished
    by_phase = {line["phase"]: line["bytes_payload"] for line in lines(directory, "train") if line["step"] in (9, 19)}
    ratio = summary["trainable_parameters"] / 166208
    assert by_phase["relora"] / by_phase["warm_start"] == pytest.approx(ratio, rel=0.01)
    assert summary["bytes_wire"] < summary["full_rank_bytes_wire"]
    assert lines(directory, "train")[19]["bytes_payload"] > by_phase["relora"], "the restart's own bytes are counted"


def test_the_exported_model_has_the_runs_validation_loss(finished, tmp_path):
    directory, summary = finished
    export(directory, tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert "lora" not in " ".join(load_file(tmp_path / "model" / "model.safetensors"))
    recipe = load_recipe(str(directory / "recipe.yaml"))
    prepared = data.prepare(recipe.data)
    result = evaluate(model, prepared, seq_len=64, micro_batch_size=7, device=torch.device("cpu"))
    assert result.val_loss == pytest.approx(summary["val_loss"], rel=1e-6)
    assert result.val_tokens == summary["val_tokens"] == len(prepared.validation) - 1
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    assert tokenizer.decode(tokenizer("An expression list")["input_ids"]).strip() == "An expression list"


def test_two_runs_are_equal_to_the_last_digit_and_so_are_world_sizes_and_micro_batches(finished, tmp_path):
    directory, summary = finished
    run(tmp_path / "again")
    assert losses(tmp_path / "again") == losses(directory)
    first, again = (load_file(d / "export" / "model.safetensors") for d in (directory, tmp_path / "again"))
    assert all(torch.equal(first[name], again[name]) for name in first)

    other = run(tmp_path / "other", "train.micro_batch_size=2", world_size=1)
    for step, loss in losses(tmp_path / "other").items():
        assert loss == pytest.approx(losses(directory)[step], rel=2e-6)
    assert other["val_loss"] == pytest.approx(summary["val_loss"], rel=2e-6)


def test_evaluation_is_the_same_for_every_world_size_and_micro_batch(tmp_path):
    values = [
        run(
            tmp_path / f"{world}-{micro}",
            "train.steps=3",
            "warm_start_steps=0",
            "relora.restart_every=null",
            "optim.lr=1e-12",
            f"train.batch_sequences={12}",
            f"train.micro_batch_size={micro}",
            world_size=world,
        )["val_loss"]
        for world, micro in ((1, 6), (2, 3), (3, 4))
    ]
    assert max(values) - min(values) <= 1e-6 * values[0]


def printed(overrides: list[str]) -> str:
    """What a rank prints while it trains."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        train("tiny", overrides)
    return out.getvalue()


def test_it_says_how_weights_are_stored_and_warns_once(tmp_path):
    first, second = ranks(2).run(
        printed,
        [
            f"run_dir={tmp_path / 'r'}",
            "train.steps=18",
            "relora.restart_every=4",
            "relora.frozen_dtype=int8",
            "relora.frozen_master=none",
        ],
    )
    assert first.count("frozen weights: int8, no masters") == 1
    assert first.count("warning: relora.frozen_master: none means") == 1  # the engine of each phase warns as well
    assert second == ""


@pytest.mark.parametrize(
    "stage, precision",
    [
        pytest.param("zero0", "bf16", marks=pytest.mark.slow),
        pytest.param("zero2", "bf16", marks=pytest.mark.slow),
        ("zero3", "bf16"),
        ("zero1_offload", "fp32"),
        pytest.param("zero3_offload", "bf16", marks=pytest.mark.slow),
    ],
)
def test_every_stage_runs(tmp_path, stage, precision):
    summary = run(tmp_path / "r", f"deepspeed={stage}", f"precision={precision}", "train.steps=22")
    assert summary["restarts"] == 1 and math.isfinite(summary["val_loss"])
    export = AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "export")
    assert export.dtype == torch.float32


@pytest.mark.parametrize("method, num_parameters", [("full", 166208), ("lora", 75712), ("control", 75712)])
def test_the_other_methods_run(tmp_path, method, num_parameters):
    """All parameters of these train; LoRA has no base weight, and Control is a network of ReLoRA's trainable size."""
    summary = run(
        tmp_path / method, f"method={method}", "train.steps=12", "warm_start_steps=0", "relora.restart_every=null"
    )
    assert summary["trainable_parameters"] == summary["total_parameters"] == pytest.approx(num_parameters, rel=0.01)
    assert summary["restarts"] == 0 and math.isfinite(summary["val_loss"])
    AutoModelForCausalLM.from_pretrained(tmp_path / method / "export")


def test_lora_on_the_warm_start_differs_from_relora_only_by_restarts(finished, tmp_path):
    directory, _ = finished
    run(tmp_path / "lora", "method=lora", "lora.base=warm_start", "relora.restart_every=null")
    ours, theirs = losses(directory), losses(tmp_path / "lora")
    assert all(ours[step] == theirs[step] for step in range(1, 21))
    assert ours[23] != theirs[23]


def test_init_from_a_finished_run_starts_where_it_ended(finished, tmp_path):
    directory, summary = finished
    run(
        tmp_path / "more",
        f"init_from={directory}",
        "warm_start_steps=0",
        "train.steps=12",
        "optim.lr=1e-12",
        "relora.restart_every=null",
    )
    assert lines(tmp_path / "more", "eval")[-1]["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-5)
