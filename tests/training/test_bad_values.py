"""Absurd values, unusable text and unreadable files are refused by name before anything exists, also by `check`."""

import json
from pathlib import Path

import pytest
import torch.distributed as dist

from relora_ds.__main__ import main
from relora_ds.config import Recipe, read_recipe
from relora_ds.config.fields import fields_of

FIELDS = fields_of(Recipe)
INTEGERS = [key for key, field in FIELDS.items() if int in field.options]
NUMBERS = [key for key, field in FIELDS.items() if float in field.options and str not in field.options]
TEXTS = [key for key, field in FIELDS.items() if str in field.options]
PATHS = [key for key, field in FIELDS.items() if field.is_path]


@pytest.fixture
def refused(tmp_path, capfd):
    """Run `train` and `check` with overrides of tiny; return what both say of one field."""

    def run(key: str, *overrides: str, check: bool = True) -> str:
        run_dir = tmp_path / "run"
        given = [f"run_dir={run_dir}"] if key != "run_dir" else []
        said = []
        for command in (["train", "--config", "tiny"], ["check", "tiny"])[: 2 if check else 1]:
            assert main([*command, *given, *overrides]) == 2, f"{command[0]} {overrides}"
            printed = capfd.readouterr().err
            assert "Traceback" not in printed and not run_dir.exists() and not dist.is_initialized()
            said.append(next(line.strip() for line in printed.splitlines() if line.strip().startswith(key)))
        assert len(set(said)) == 1
        return said[0]

    return run


def problems_of(*overrides: str) -> list[str]:
    return read_recipe("tiny", overrides, check_files=False)[1]


def test_the_fields_are_all_there():
    assert len(INTEGERS) > 20 and len(NUMBERS) > 8 and len(TEXTS) > 20
    assert "seed" in INTEGERS and "optim.lr" in NUMBERS and "data.split" in TEXTS


@pytest.mark.parametrize("key", INTEGERS)
def test_absurd_integers(key):
    for value in ("1e300", str(2**64), "-1", "-1e300", "inf", "nan", "1e999999", "1.5", "''", "0x"):
        found = [p for p in problems_of(f"{key}={value}") if p.startswith(f"{key}:")]
        assert len(found) == 1 and "use" in found[0] or "default" in found[0], (value, found)
        assert len(found[0]) < 200


@pytest.mark.parametrize("key", NUMBERS)
def test_absurd_numbers(key):
    for value in ("1e300", "-1", "inf", "-inf", "nan", ".inf", ".NaN", "1e999", "1e-300", "''", "a lot"):
        found = [p for p in problems_of(f"{key}={value}") if p.startswith(f"{key}:")]
        assert len(found) == 1 and ("use" in found[0] or "default" in found[0]), (value, found)


@pytest.mark.parametrize("key", TEXTS)
def test_text_that_is_none(key):
    for value, what in (
        ("''", "is empty"),
        ("' '", "is empty"),
        ('"a\\nb"', "line break"),
        ('"a\\0b"', "control"),
        ("a\udcffb", "broken UTF-8"),
    ):
        found = [p for p in problems_of(f"{key}={value}") if p.startswith(f"{key}:")]
        assert len(found) == 1 and what in found[0], (value, found)


def test_paths_that_cannot_be_one():
    for key in PATHS:
        for path, message in (
            ("~no_such_user/x", "~no_such_user/x is in no known home"),
            (f"/tmp/{'a' * 300}", "a name in /tmp/aaa"),
        ):
            assert any(p.startswith(f"{key}: {message}") for p in problems_of(f"{key}={path}"))
    assert problems_of("run_dir=./~nobody") == []


def test_the_largest_values_that_are_fine():
    largest = [f"seed={2**64 - 1}", "data.max_tokens=1e15", "relora.restart_every=null", "train.steps=1e9"]
    assert problems_of(*largest) == []
    assert "above" in problems_of("train.tokens=1e15")[0]
    assert (
        "gives 999998 restarts"
        in problems_of("train.steps=1e7", "optim.warmup_steps=2", "relora.restart_warmup_steps=2")[0]
    )


def test_names_given_twice_or_empty():
    for key in ("relora.target_modules", "relora.exclude_modules", "relora.trainable_modules"):
        assert problems_of(f"{key}=[q_proj, norm, q_proj]") == [f"{key}: q_proj is given twice; remove one"]
        assert problems_of(f"{key}=[q_proj, '']")[0].startswith(f"{key}: '' is empty")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"seed={2**64}", "seed: 18446744073709551616 is above 18446744073709551615; use e.g. 0"),
        ("train.steps=1e300", "train.steps: 1E+300 is above 1000000000; use e.g. 8"),
        (
            "model.attn_implementation=flash_attn_2",
            "model.attn_implementation: 'flash_attn_2' is unknown (did you mean",
        ),
        ("model.attn_implementation=spda", "model.attn_implementation: 'spda' is unknown (did you mean sdpa?)"),
        (
            "model.attn_implementation=kernels-community/flash-attn",
            "model.attn_implementation: kernels-community/flash-attn is a kernel of the Hugging Face hub",
        ),
    ],
)
def test_values_that_train_and_check_refuse_alike(refused, override, message):
    assert refused(override.partition("=")[0], override).startswith(message)


def test_flash_attention_needs_its_package(refused, monkeypatch, capfd):
    given = ["model.attn_implementation=flash_attention_2", "precision=bf16"]
    assert "cannot be used on this machine" in refused("model.attn_implementation", *given, check=False)
    assert main(["check", "tiny", given[0]]) == 2  # whose precision is fp32
    assert "flash_attention_2 computes in 16 bit only" in capfd.readouterr().err
    assert main(["check", "tiny", *given]) == 0  # asked about another machine, it warns
    assert "model.attn_implementation: flash_attention_2 cannot be used on this machine" in capfd.readouterr().out


def test_attention_that_the_family_lacks(refused, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2}')
    shape = f"model.name_or_path={tmp_path / 'config.json'}"
    assert "sdpa is not available for mamba models; use eager" in refused("model.attn_implementation", shape)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"zero_optimization: {stage: 1}", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON"),
        (b"[1, 2]", "holds a list, not an object"),
        (b'"zero1"', "holds a str, not an object"),
        (b"null", "holds a NoneType"),
        (b'{"gradient_clipping": NaN}', "NaN is not a number of JSON"),
        (b"[" * 10**5, "is not valid JSON"),
        (
            b'{"zero_optimization": {"stage": 1}, "zero_optimization": {"stage": 2}}',
            "key given twice: zero_optimization",
        ),
        (b'{"zero_optimization": {"stage": 1, "reduce_bucket_size": "big"}}', "reduce_bucket_size"),
        (b'{"zero_optimization": {"stage": 1, "reduce_bucket_size": -5}}', "reduce_bucket_size"),
        (b'{"zero_optimization": {"stage": 1, "offload_optimizer": "cpu"}}', "offload_optimizer"),
        (b'{"zero_optimization": {"stage": 1e300}}', "zero_optimization.stage"),
        (b'{"zero_optimization": []}', "zero_optimization"),
        (b'{"bf16": 1}', "bf16"),
        (b'{"optimizer": []}', "optimizer"),
        (b'{"optimizer": {"type": "AdamW", "params": [1]}}', "optimizer.params"),
        (b'{"train_batch_size": "many"}', "train_batch_size"),
        (b'{"train_batch_size": -8}', "train_batch_size"),
        (b'{"fp16": {"enabled": false, "loss_scale_window": "x"}}', "loss_scale_window"),
    ],
)
def test_deepspeed_files(refused, tmp_path, content, message):
    (tmp_path / "ds.json").write_bytes(content)
    assert message in refused("deepspeed", f"deepspeed={tmp_path / 'ds.json'}")


def test_directories_and_files_without_permission(refused, tmp_path, monkeypatch):
    assert "is neither a file nor a shipped configuration" in refused("deepspeed", f"deepspeed={tmp_path}")
    (tmp_path / "ds.json").write_text("{}")
    (tmp_path / "m.json").write_text("[1]")
    assert "has no readable configuration" in refused("model.name_or_path", f"model.name_or_path={tmp_path / 'm.json'}")
    (tmp_path / "m.json").write_text(json.dumps({"model_type": "llama", "hidden_size": -30, "num_attention_heads": 2}))
    assert "transformers cannot build this llama model" in refused("model", f"model.name_or_path={tmp_path / 'm.json'}")
    read_text = Path.read_text

    def denied(path: Path, *arguments, **options):  # root may read everything
        if path.name == "ds.json":
            raise PermissionError(13, "Permission denied")
        return read_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "read_text", denied)
    assert "cannot be read (Permission denied)" in refused("deepspeed", f"deepspeed={tmp_path / 'ds.json'}")


def test_a_recipe_that_is_no_file(tmp_path, capfd):
    for name in (str(tmp_path), f"/tmp/{'a' * 300}", "a\0b"):
        assert main(["train", "--config", name]) == 2
        printed = capfd.readouterr().err
        assert "no shipped recipe of that name" in printed and "Traceback" not in printed
