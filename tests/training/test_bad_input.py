"""Every mistake in a recipe is named before a process group, a model or a run directory exists."""

import json
import sys
from socket import gethostname

import pytest
import torch.distributed as dist

from relora_ds.train import main
from relora_ds.zero import optimizers


@pytest.fixture
def fails(tmp_path, capfd):
    """Run the tiny recipe with overrides; assert that it is refused; return what was printed."""

    def run(*overrides: str) -> str:
        run_dir = tmp_path / "run"
        assert main(["--config", "tiny", f"run_dir={run_dir}", *overrides]) == 2
        assert not run_dir.exists() and not dist.is_initialized()
        return capfd.readouterr().err

    return run


@pytest.mark.parametrize(
    "override, message",
    [
        ("relora.restrat_every=5", "relora.restart_every"),
        ("train.steps=many", "train.steps"),
        ("relora.r=65", "relora.r: 65 exceeds the smaller side of model.layers.0"),
        ("relora.target_modules=[q_porj]", "relora.target_modules: 'q_porj' matches no module"),
        ("relora.restart_every=2", "relora.restart_every: 2"),
        ("relora.reset_ratio=1.0", "relora.reset_ratio: 1.0"),
        ("train.batch_sequences=7", "train.batch_sequences: 7"),
        ("data.vocab_size=100000", "data.vocab_size"),
        ("train.batch_sequences=100000", "train.batch_sequences: 100000 is more than the"),
        ("deepspeed=zero9", "deepspeed: zero9 is neither a file nor a shipped configuration"),
        ("relora.frozen_dtype=nf8", "relora.frozen_dtype: 'nf8' is unknown (did you mean nf4?)"),
        ("activation_checkpointing=cheep", "activation_checkpointing: 'cheep' is unknown (did you mean cheap?)"),
        ("method=rellora", "method: 'rellora' is unknown"),
    ],
)
def test_one_mistake(fails, override, message):
    assert message in fails(override)


def test_a_format_without_its_library_or_with_blocks_that_do_not_divide(fails, tmp_path, monkeypatch):
    sizes = {
        "model_type": "llama",
        "hidden_size": 20,
        "intermediate_size": 36,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 256,
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    printed = fails(
        "relora.frozen_dtype=nf4", "relora.r=4", "model.preset=null", f"model.name_or_path={tmp_path / 'config.json'}"
    )
    assert 'relora.frozen_dtype: nf4 needs bitsandbytes; pip install ".[quantization]"' in printed
    assert "relora.frozen_dtype: model.layers.0.self_attn.q_proj and 7 more: nf4 stores blocks of 64" in printed


def test_an_optimizer_without_its_library(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert 'optim.name: adamw_8bit needs bitsandbytes; pip install ".[quantization]", or use adamw' in fails(
        "optim.name=adamw_8bit"
    )


def test_an_optimizer_with_an_old_library(fails, monkeypatch):
    monkeypatch.setattr(optimizers, "version_of", lambda distribution: "0.49.2")
    assert "adamw_8bit needs bitsandbytes 0.50 or newer, and 0.49.2 is installed; pip" in fails("optim.name=adamw_8bit")


def test_partitions_that_8_bit_cannot_count(fails, tmp_path):
    sizes = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "max_position_embeddings": 256,
    }
    (tmp_path / "config.json").write_text(json.dumps(sizes))
    model = ["model.preset=null", f"model.name_or_path={tmp_path / 'config.json'}", "method=full", "precision=bf16"]
    printed = fails("optim.name=adamw_8bit", *model, "warm_start_steps=0", "deepspeed=zero2")
    assert "optim.name: adamw_8bit steps 2,147,483,647 elements at once at most, and at ZeRO stage 2 a part" in printed


def test_restart_interval_against_the_warmup(fails):
    assert "relora.restart_every: 5" in fails("relora.restart_every=5", "optim.warmup_steps=5")


def test_all_mistakes_at_once(fails):
    printed = fails(
        "relora.restrat_every=5",
        "relora.r=65",
        "relora.reset_ratio=2",
        "train.batch_sequences=7",
        "data.source=text",
        "data.path=no/such/file.txt",
        "method=full",
        "deepspeed=zero9",
    )
    for field in (
        "relora.restrat_every",
        "relora.reset_ratio: 2",
        "train.batch_sequences: 7",
        "data.path: no/such",
        "deepspeed: zero9",
    ):
        assert printed.count(field) == 1, f"{field} in:\n{printed}"


def test_corpus(fails, tmp_path):
    assert "no/such.txt does not exist" in fails("data.source=text", "data.path=no/such.txt")
    (tmp_path / "empty.txt").touch()
    assert "empty" in fails("data.source=text", f"data.path={tmp_path / 'empty.txt'}")
    (tmp_path / "small.txt").write_text("Too little to make a batch of.\n" * 60)
    assert "train.batch_sequences: 8 is more than" in fails(
        "data.source=text", f"data.path={tmp_path / 'small.txt'}", "data.vocab_size=300", "data.seq_len=256"
    )


def test_model_and_tokenizer(fails, tmp_path):
    from tests.small_models import llama

    llama().save_pretrained(tmp_path / "model")
    printed = fails("model.preset=null", f"model.name_or_path={tmp_path / 'model'}", "data.seq_len=33")
    assert "data.seq_len: 33" in printed or "seq_len" in printed and "33" in printed
    printed = fails(
        "model.preset=null", f"model.name_or_path={tmp_path / 'model'}", "model.init=pretrained", "data.seq_len=32"
    )
    assert "vocabulary of 67" in printed and "512" in printed


@pytest.mark.parametrize(
    "change, message",
    [
        ({"optimizer": {"type": "OneBitAdam", "params": {"lr": 1e-3}}}, "OneBitAdam"),
        ({"optimizer": {"type": "Muon", "params": {}}}, "Muon"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "nvme_path": "x"}}}, "nvme"),
        ({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "zero_quantized_weights"),
        ({"train_micro_batch_size_per_gpu": 3}, "train_micro_batch_size_per_gpu"),
        ({"bf16": {"enabled": True}}, "bf16"),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, "scheduler"),
    ],
)
def test_ds_config(fails, tmp_path, change, message):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 1}, **change}))
    assert message in fails(f"deepspeed={path}")


def test_an_existing_run_is_not_touched(tmp_path, capfd):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "recipe.yaml").write_text("method: relora\n")
    assert main(["--config", "tiny", f"run_dir={run_dir}"]) == 2
    printed = capfd.readouterr().err
    assert "resume=auto" in printed and "overwrite=true" in printed
    assert [p.name for p in run_dir.iterdir()] == ["recipe.yaml"]


def test_overwrite_does_not_delete_what_is_no_run(tmp_path, capfd):
    (tmp_path / "thesis.tex").write_text("years of work")
    assert main(["--config", "tiny", f"run_dir={tmp_path}", "overwrite=true"]) == 2
    assert "holds something that is not a run" in capfd.readouterr().err
    assert (tmp_path / "thesis.tex").exists()


@pytest.mark.parametrize("rank, local_rank, printed", [("1", "1", ""), ("8", "0", f"{gethostname()}: error: 1 prob")])
def test_it_is_said_once_on_every_machine(monkeypatch, capfd, tmp_path, rank, local_rank, printed):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert main(["--config", "tiny", f"run_dir={tmp_path / 'r'}", "relora.target_modules=[q_porj]"]) == 2
    assert capfd.readouterr().err[: len(printed) or None] == printed


def test_resume_from_what_is_no_checkpoint(tmp_path, capfd):
    assert main(["--config", "tiny", f"run_dir={tmp_path / 'r'}", f"resume={tmp_path}"]) == 4
    assert not dist.is_initialized()
    assert "is no checkpoint" in capfd.readouterr().err


def test_overwrite_does_not_delete_what_the_run_is_to_read(tmp_path, capfd):
    run_dir = tmp_path / "run"
    (run_dir / "texts").mkdir(parents=True)
    (run_dir / "texts" / "mine.txt").write_text("Nobody else has this text.\n" * 500)
    (run_dir / "recipe.yaml").touch()
    assert (
        main(
            [
                "--config",
                "tiny",
                f"run_dir={run_dir}",
                "overwrite=true",
                "data.source=text",
                f"data.path={run_dir}/texts/*.txt",
                f"init_from={run_dir}",
                "warm_start_steps=0",
            ]
        )
        == 2
    )
    printed = capfd.readouterr().err
    assert "data.path: " in printed and "init_from: " in printed and "overwrite=true deletes" in printed
    assert (run_dir / "texts" / "mine.txt").is_file()
