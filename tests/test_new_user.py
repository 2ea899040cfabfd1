"""A new user: `pip install .` into an empty environment, an empty folder, a text file and a tokenizer of their own."""

import json
import os
import subprocess
import venv
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.devices import GUARD

REPOSITORY = Path(__file__).parent.parent
pytestmark = pytest.mark.slow

MAKE_CORPUS = """
import pathlib, random, sysconfig
sources = sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py"))
text = "".join(path.read_text(encoding="utf-8", errors="ignore") for path in sources)[:1_000_000]
pathlib.Path("mine.txt").write_text(text, encoding="utf-8")
"""
MAKE_TOKENIZER = """
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=["<eos>"],
                              initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
tokenizer.train(["mine.txt"], trainer)
PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>").save_pretrained("my_tokenizer")
"""
FINE_TUNE = """
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("my_model")
model = get_peft_model(AutoModelForCausalLM.from_pretrained("my_model"),
                       LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
batch = tokenizer("def main():\\n    return 0\\n", return_tensors="pt")
losses = []
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
for _ in range(2):
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[1] < losses[0], losses
print("fine-tuned:", *losses)
"""
TRAIN = [
    "--config",
    "tiny",
    "run_dir=runs/mine",
    "data.source=text",
    "data.path=mine.txt",
    "data.tokenizer=./my_tokenizer",
    "data.cache_dir=cache",
    "checkpoint.every=15",
]


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """`user(command, *arguments)` runs a program of the new environment in the user's folder."""
    environment, folder = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("folder")
    venv.create(environment, with_pip=True)
    # The torch that the tests run with: whatever is newest might bring gigabytes, and is not what was tested.
    constraint = environment / "constraint.txt"
    constraint.write_text(f"torch=={version('torch').partition('+')[0]}\n")
    clean = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    clean |= {
        "PATH": f"{environment / 'bin'}:{os.environ['PATH']}",
        "PIP_CONSTRAINT": str(constraint),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(GUARD),
    }

    def run(*command: str, expect: int = 0) -> str:
        done = subprocess.run(command, cwd=folder, env=clean, capture_output=True, text=True, timeout=900)
        printed = done.stdout + done.stderr
        assert done.returncode == expect, f"{command} ended with {done.returncode}:\n{printed}"
        return printed

    run.folder = folder
    run("pip", "install", "--quiet", f"{REPOSITORY}[peft]")
    assert str(environment) in run("python", "-c", "import relora_ds; print(relora_ds.__file__)")
    return run


def test_from_pip_install_to_a_fine_tuned_model(user):
    assert list(user.folder.iterdir()) == []
    user("python", "-c", MAKE_CORPUS)
    user("python", "-c", MAKE_TOKENIZER)

    first = user("deepspeed", "--num_gpus", "2", "--module", "relora_ds.train", *TRAIN, "train.steps=30")
    assert "restart 1: merged" in first and "verified on all ranks" in first

    # The second half once more, by the other entry point.
    reference = json.loads((user.folder / "runs/mine/summary.json").read_text())
    again = user(
        "torchrun",
        "--nproc_per_node",
        "2",
        "-m",
        "relora_ds",
        "train",
        *TRAIN,
        "train.steps=30",
        "resume=runs/mine/checkpoints/step_00000015",
    )
    assert "resuming after step 15" in again
    summary = json.loads((user.folder / "runs/mine/summary.json").read_text())
    assert summary["val_loss"] == reference["val_loss"] and summary["restarts"] == 1

    user("python", "-m", "relora_ds", "export", "runs/mine", "my_model")
    evaluated = json.loads(user("python", "-m", "relora_ds", "eval", "my_model", "--data", "runs/mine", "--json"))
    assert evaluated["val_loss"] == pytest.approx(summary["val_loss"], rel=1e-6)
    assert "fine-tuned:" in user("python", "-c", FINE_TUNE)


def test_a_shipped_recipe_in_an_empty_folder(user):
    user(
        "python",
        "-m",
        "relora_ds",
        "train",
        "--config",
        "quickstart",
        "data.source=pydocs",
        "data.cache_dir=cache",
        "train.steps=2",
        "warm_start_steps=0",
        "relora.restart_every=null",
        "optim.warmup_steps=1",
        "train.batch_sequences=2",
        "train.micro_batch_size=2",
        "run_dir=runs/small",
    )
    assert (user.folder / "runs/small/export/config.json").is_file()
    printed = user("python", "-m", "relora_ds", "train", "--config", "quikstart", expect=2)
    assert "did you mean quickstart" in printed and "Traceback" not in printed
