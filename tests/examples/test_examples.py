"""The scripts in examples/, as a reader runs them: with small settings, on the CPU, without a network."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import relora_ds
from relora_ds.utils.ports import free_port
from tests.devices import GUARD
from tests.small_models import llama

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
TOKENIZER = ROOT / "tests" / "fixtures" / "v0_1" / "run" / "checkpoints" / "tokenizer"


def start(command: list[str], directory: Path, **environment: str) -> subprocess.Popen:
    hidden = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in hidden}
    bin = Path(sys.executable).parent
    own = {"PYTHONPATH": f"{GUARD}:{ROOT}", "PATH": f"{bin}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**kept, **own, "HF_HUB_OFFLINE": "1", **environment},
    )


def output_of(process: subprocess.Popen) -> str:
    try:
        printed, _ = process.communicate(timeout=600)
    finally:
        process.kill()
    assert process.returncode == 0, printed[-5000:]
    return printed


def run(directory: Path, script: str, *arguments: str, ranks: int = 0) -> str:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", str(free_port())]
    command = [sys.executable, *(launcher if ranks else []), str(EXAMPLES / script), *arguments]
    return output_of(start(command, directory))


@pytest.mark.slow
def test_own_loop_and_its_resume_on_more_ranks(tmp_path):
    printed = run(tmp_path, "own_loop.py", "--steps", "30")
    assert "trainable params: " in printed and "1 restarts" in printed
    losses = [float(loss) for loss in re.findall(r"step .* loss ([0-9.]+)", printed)]
    assert len(losses) == 3 and losses[-1] < losses[0]
    merged = float(re.search(r"merged model's loss: ([0-9.]+)", printed)[1])
    assert merged < losses[0]
    printed = run(tmp_path, "own_loop.py", "--steps", "50", "--stage", "3", "--resume", ranks=2)
    assert re.findall(r"step +(\d+) ", printed) == ["40", "50"] and "2 restarts" in printed
    assert float(re.search(r"merged model's loss: ([0-9.]+)", printed)[1]) < merged


@pytest.mark.slow
def test_hf_trainer_and_its_resume(tmp_path):
    printed = run(tmp_path, "hf_trainer.py", ranks=2)
    assert re.findall(r"'restarts': '?(\d)", printed) == ["1", "2"]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "merged")
    assert not any("lora" in name for name, _ in plain.named_parameters())
    printed = run(tmp_path, "hf_trainer.py", "--steps", "45", "--stage", "3", "--resume", ranks=1)
    assert re.findall(r"'restarts': '?(\d)", printed) == ["3"]


@pytest.fixture
def pretrained(tmp_path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    llama(vocab_size=len(tokenizer), max_position_embeddings=64).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.slow
def test_continued_pretraining(tmp_path, pretrained):
    text = str(ROOT / "docs" / "concepts" / "*.md")
    small = ("--steps", "40", "--length", "32", "--batch", "8", "--rank", "8", "--lr", "5e-3")
    printed = run(tmp_path, "continued_pretraining.py", "--model", str(pretrained), "--text", text, *small)
    before, after = (float(loss) for loss in re.search(r"loss ([0-9.]+) -> ([0-9.]+) after 40", printed).groups())
    assert after < before and "3 restarts" in printed
    found = relora_ds.load_run(tmp_path / "out")
    assert len(found.tokenizer()) == found.merged().config.vocab_size
    assert "give more than" in output_of_failure(tmp_path, "--model", str(pretrained), "--text", "nothing*.txt")


def output_of_failure(directory: Path, *arguments: str) -> str:
    process = start([sys.executable, str(EXAMPLES / "continued_pretraining.py"), *arguments], directory)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode
    return printed


@pytest.mark.slow
def test_multi_node(tmp_path):
    """Two machines, here both of them this one."""
    bash = shutil.which("bash")
    command = [bash, str(EXAMPLES / "multi_node.sh"), "--steps", "30"]
    port = str(free_port())
    machines = [
        start(command, tmp_path, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, NODES="2", NODE_RANK=str(rank), RANKS="1")
        for rank in range(2)
    ]
    first, second = [output_of(machine) for machine in machines]
    assert "1 restarts" in first and "restarts" not in second
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": os.environ["PATH"]})
    assert done.returncode and "NODES: set it to the number of machines" in done.stderr


def test_every_example_is_run():
    tested = Path(__file__).read_text(encoding="utf-8")
    for path in EXAMPLES.glob("*.*"):
        assert path.name == "text.py" or f'"{path.name}"' in tested, path.name
