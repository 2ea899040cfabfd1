"""`check`: a recipe's calendar and costs, or all of its problems."""

import time

import pytest

from relora_ds.__main__ import main
from relora_ds.commands.check import _fp8
from relora_ds.training.preflight import resolve


@pytest.fixture(autouse=True)
def no_data(monkeypatch, tmp_path):
    """Nothing may be downloaded or tokenized: the cache stays as empty as it was."""
    monkeypatch.setenv("RELORA_DS_CACHE", str(tmp_path / "cache"))
    yield
    assert not (tmp_path / "cache").exists()


def check(capsys, *arguments: str) -> tuple[int, str]:
    code = main(["check", *arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_the_quickstart(capsys):
    started = time.monotonic()
    code, text = check(capsys, "quickstart", "--world-size", "2")
    assert code == 0 and time.monotonic() - started < 300  # a few, on an idle machine
    assert "batch: 16 sequences of 128 tokens = micro-batch 8 x 2 ranks x accumulation 1" in text
    rows = {line.split("  ")[1].strip(): line.split() for line in text.splitlines() if line.startswith("  ")}
    assert rows["100"][:4] == ["100", "galore", "restart", "1"]
    assert rows["trainable (T)"][-2:] == ["2.27M", "5.26M"]
    for line in (
        "memory of a rank, device, kept between steps",
        "bytes per step, payload",
        "bytes per restart, payload",
        "learning rate (peak 0.004)",
        "|                 ^                 ^",
        "seconds at 10 Gbit/s",
        "product: folded (auto folds from ",
    ):
        assert line in text


def test_the_recipe_as_train_takes_it(capsys):
    assert check(capsys, "--config", "tiny", "relora.r=2")[0] == 0
    code, text = check(capsys, "tiny", "relora.r=2", "--world-size", "2", "precision=bf16")  # before and after
    assert code == 0 and "bf16" in text


def test_auto_is_planned_as_on_gpus(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    _, text = check(capsys, "quickstart")
    assert "bf16 (auto, as on GPUs; this machine would run fp32)" in text.splitlines()[0]
    _, text = check(capsys, "quickstart", "precision=fp32")
    assert ", fp32, ZeRO" in text.splitlines()[0]
    config = tmp_path / "fp16.json"
    config.write_text('{"fp16": {"enabled": true}, "zero_optimization": {"stage": 1}}')
    _, text = check(capsys, "quickstart", f"deepspeed={config}", "relora.residual_every=null")
    assert "fp16 (auto, as the DeepSpeed configuration says)" in text.splitlines()[0]


def test_beside_a_run(capsys, tmp_path):
    (tmp_path / "status.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text("")
    code, text = check(capsys, "tiny", f"run_dir={tmp_path}")
    assert code == 0 and "learning rate" in text
    assert [line for line in text.splitlines() if line.startswith(f"WARNING: run_dir: {tmp_path} ")]
    assert "run_dir" not in check(capsys, "tiny", f"run_dir={tmp_path}", "resume=auto")[1]


@pytest.mark.parametrize("world_size", ["0", "-2"])
def test_a_world_size_that_is_no_number_of_ranks(capsys, world_size):
    code, text = check(capsys, "tiny", "--world-size", world_size)
    assert code == 1 and "--world-size" in text and world_size in text and text.count("\n") == 1


def test_no_restart_is_said_loudly(capsys):
    _, text = check(capsys, "tiny", "relora.restart_every=null")
    warnings = [line for line in text.splitlines() if line.startswith("WARNING")]
    assert "no restart" in warnings[0]


def test_what_frozen_weights_do_not_do_is_said(capsys):
    _, text = check(capsys, "tiny", "relora.frozen_dtype=int8", "relora.frozen_placement=sharded", "deepspeed=zero2")
    assert "WARNING: relora.frozen_placement: sharded has no effect at ZeRO stage 2" in text
    _, text = check(capsys, "tiny", "relora.frozen_dtype=nf4", "relora.frozen_master=none", "deepspeed=zero3")
    assert "WARNING: relora.frozen_master: none" in text and "merge_loss" in text and text.count("WARNING") == 1


@pytest.mark.parametrize(
    "overrides, able, words",
    [
        (["precision=fp32"], True, "dequantized for every product: the run's precision is fp32"),
        (["precision=bf16"], False, "dequantized for every product: no GPU here multiplies in fp8"),
        (["precision=bf16", "deepspeed=zero3"], True, "dequantized for every product: ZeRO-3 shards W"),
        (["precision=bf16"], True, "products are in fp8"),
    ],
)
def test_whether_fp8_weights_multiply_in_fp8(monkeypatch, overrides, able, words):
    monkeypatch.setattr("relora_ds.planning.planned_storage._this_machine_multiplies_fp8", lambda: able)
    resolved = resolve("tiny", ["relora.frozen_dtype=fp8", *overrides], 1, to_run=False)
    (line,) = _fp8(resolved)
    assert line.startswith("fp8: ") and words in line
    assert _fp8(resolve("tiny", overrides, 1, to_run=False)) == []


def test_every_problem_at_once(capsys):
    code, text = check(capsys, "tiny", "relora.r=0", "optim.lr=-1", "train.stepz=3", "model.preset=llama_9z")
    assert code == 2
    for field in ("relora.r", "optim.lr", "train.stepz", "model.preset"):
        assert field in text


def test_a_world_size_that_does_not_divide_the_batch(capsys):
    code, text = check(capsys, "tiny", "--world-size", "3")
    assert code == 2 and "3 ranks" in text and "train.batch_sequences=12" in text


def test_a_tokenizer_on_the_hub_is_not_loaded(capsys):
    code, text = check(capsys, "tiny", "data.tokenizer=some/tokenizer", "data.vocab_size=777")
    assert code == 0 and "vocabulary: 777" in text and "some/tokenizer is not loaded" in text


def test_no_recipe_and_two_recipes(capsys):
    assert check(capsys)[0] == 2
    code, text = check(capsys, "tiny", "quickstart")
    assert code == 2 and "tiny and quickstart" in text


def test_a_recipe_that_does_not_exist(capsys):
    code, text = check(capsys, "quikstart")
    assert code == 2 and text.count("\n") == 2 and "did you mean quickstart?" in text


def test_many_restarts_are_cut(capsys):
    code, text = check(capsys, "tiny", "train.steps=2010", "relora.restart_warmup_steps=2")
    assert code == 0 and "more)" in text and len(text.splitlines()) < 80
