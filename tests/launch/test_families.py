"""Model families other than LLaMA through the command line: trained and exported to the run's own loss, or refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    FalconConfig,
    MambaConfig,
    MixtralConfig,
    PretrainedConfig,
    Qwen2Config,
)

from relora_ds.data import prepare
from relora_ds.training.preflight import resolve
from relora_ds.training.validation import evaluate

REPOSITORY = Path(__file__).parents[2]
VOCAB = 512
SIZES = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
CONFIGS = {
    "falcon": FalconConfig(**SIZES),
    "mamba": MambaConfig(vocab_size=VOCAB, hidden_size=32, state_size=4, num_hidden_layers=2, time_step_rank=4),
    "mixtral": MixtralConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, num_local_experts=4),
    "qwen2": Qwen2Config(**SIZES, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=False),
    "qwen2 with a head of its own, said to be tied": Qwen2Config(
        **SIZES, intermediate_size=48, num_key_value_heads=2, tie_word_embeddings=True
    ),
}


def overrides_of(directory: Path, run_dir: Path, config: PretrainedConfig) -> list[str]:
    attention = "eager" if config.model_type == "mamba" else "sdpa"
    return [
        "model.preset=null",
        f"model.name_or_path={directory}",
        f"model.attn_implementation={attention}",
        f"run_dir={run_dir}",
        f"data.vocab_size={VOCAB}",
        "data.seq_len=32",
        "data.max_tokens=20000",
        "train.steps=20",
        "warm_start_steps=4",
        "relora.r=4",
        "relora.restart_every=5",
        "relora.restart_warmup_steps=2",
        "optim.warmup_steps=2",
        "train.batch_sequences=8",
        "train.micro_batch_size=8",
        "eval.samples=0",
        "precision=fp32",
    ]


def command(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=900, check=False
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
def test_a_family_is_trained_and_exported_to_the_loss_of_its_run(family, tmp_path):
    config, run_dir = CONFIGS[family], tmp_path / "run"
    overrides = overrides_of(tmp_path / "model", run_dir, config)
    config.save_pretrained(tmp_path / "model")
    if "head of its own" in family:
        model = AutoModelForCausalLM.from_config(config)
        model.lm_head.weight = nn.Parameter(0.02 * torch.randn_like(model.lm_head.weight))
        model.save_pretrained(tmp_path / "model")
        overrides.append("model.init=pretrained")
    checked = command("-m", "relora_ds", "check", "tiny", *overrides)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    for text in {"mamba": ("dt_proj", "frozen for good"), "mixtral": ("frozen for good", "experts")}.get(family, ()):
        assert text in checked.stdout
    done = command("train.py", "--config", "tiny", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["restarts"] == 3
    recipe = resolve("tiny", overrides, to_run=False).recipe
    exported = AutoModelForCausalLM.from_pretrained(run_dir / "export")
    again = evaluate(
        exported, prepare(recipe.data, recipe.seed), seq_len=32, micro_batch_size=8, device=torch.device("cpu")
    )
    assert again.val_loss == pytest.approx(summary["val_loss"], rel=2e-5)


@pytest.mark.slow
def test_a_family_that_does_not_predict_the_next_token_is_refused(tmp_path):
    BartConfig(
        vocab_size=VOCAB,
        d_model=32,
        decoder_layers=2,
        encoder_layers=2,
        decoder_ffn_dim=64,
        encoder_ffn_dim=64,
        decoder_attention_heads=4,
        encoder_attention_heads=4,
    ).save_pretrained(tmp_path / "bart")
    overrides = overrides_of(tmp_path / "bart", tmp_path / "run", BartConfig())
    for arguments in (("-m", "relora_ds", "check", "tiny"), ("train.py", "--config", "tiny")):
        refused = command(*arguments, *overrides)
        assert refused.returncode == 2 and "model.name_or_path: transformers' bart models" in refused.stderr
        assert "do not shift the labels" in refused.stderr
    assert not (tmp_path / "run").exists()
