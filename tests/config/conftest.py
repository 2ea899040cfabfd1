"""A recipe that is free of the shipped ones, which may change."""

import pytest

BASE = """
warm_start_steps: 100
model: {preset: llama_20m}
relora: {r: 16, lora_alpha: 16, restart_every: 125, restart_warmup_steps: 10}
train: {steps: 600, batch_sequences: 16, micro_batch_size: 8}
optim: {lr: 2.0e-3, warm_start_lr: 1.0e-3, warmup_steps: 20}
data: {seq_len: 128}
"""


@pytest.fixture
def base_recipe(tmp_path, monkeypatch):
    """Write base.yaml into a working directory of its own."""
    (tmp_path / "base.yaml").write_text(BASE)
    monkeypatch.chdir(tmp_path)
