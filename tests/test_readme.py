"""Every fenced command of the README runs, in one folder and in its order, as a reader would go through it.

They run as written, but for what `SMALLER` says: two ranks instead of eight, and runs of minutes instead of days.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")

# A real recipe's shape at a size for two CPU cores; its own sizes are in tests/test_recipes.py.
FEW_STEPS = (
    "train.steps=6 train.batch_sequences=4 train.micro_batch_size=2 warm_start_steps=2 optim.warmup_steps=1 "
    "relora.restart_every=2 relora.restart_warmup_steps=1 relora.r=4 precision=fp32"
)
TINY = f"{FEW_STEPS} model.preset=tiny data.source=pydocs data.max_tokens=null data.tokenizer=null data.vocab_size=512"
SMALLER = [
    (r"--num_gpus 8", "--num_gpus 2"),
    (r"--nproc_per_node 8", "--nproc_per_node 2"),
    (r"(train\.py --config llama_\w+)(.*)", rf"\1\2 {TINY} data.seq_len=64"),
    (r"(single_node\.sh llama_\w+)", rf"\1 {TINY} data.seq_len=64"),
    (r"(--link)$", r"\1 --seconds 2 --config quickstart"),
    (r"(train\.py --config quickstart run_dir=\S+)", rf"\1 {TINY} data.seq_len=64"),
    (r"(test\.sh)\b.*", r"\1 tests/test_config.py -q"),
    (r"(reproduce .*--scale small) --num-gpus 1", r"\1 --dry-run"),
]
# What cannot run here, and the test that runs the same script.
ELSEWHERE = {
    "pip install": "tests/test_new_user.py",
    "bash launch_scripts/multi_node.sh": "tests/launch/test_two_nodes.py",
    "sbatch": "tests/launch/test_slurm.py",
    "tensorboard": "tests/training/test_observability.py",
}


def fenced(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands() -> list[str]:
    lines = "\n".join(fenced("bash")).replace("\\\n", " ").splitlines()
    return [line.partition(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def elsewhere(command: str) -> str | None:
    return next((test for start, test in ELSEWHERE.items() if command.startswith(start)), None)


def smaller(command: str) -> str:
    for pattern, replacement in SMALLER:
        command = re.sub(pattern, replacement, command)
    return command


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout with what the README's reader has: a model of theirs, and documents."""
    folder = tmp_path_factory.mktemp("reader") / "relora_ds"
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", "plots", ".*_cache")
    shutil.copytree(REPOSITORY, folder, ignore=ignored)
    return folder


def run(command: str, folder: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HF_HUB_OFFLINE": "1",
        "VIRTUAL_ENV": sys.prefix,
    }
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def test_what_is_not_run_here_is_run_elsewhere():
    assert len(commands()) > 20
    for start, test in ELSEWHERE.items():
        assert any(command.startswith(start) for command in commands()), start
        assert (REPOSITORY / test).is_file()


def test_the_table_of_contents_and_the_links_lead_somewhere():
    anchors = {
        re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        for title in re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    }
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) > 20
    for link in links:
        assert link.startswith("https://") or link.removeprefix("#") in anchors or (REPOSITORY / link).exists(), link


@pytest.mark.slow
def test_every_command_runs(checkout):
    run(
        'python -c "from transformers import AutoTokenizer; from tests.small_models import llama; '
        "llama(vocab_size=600, hidden_size=64, intermediate_size=128, max_position_embeddings=2048).save_pretrained("
        "'my_model')\"",
        checkout,
    )
    for command in commands():
        if "example.py" in command:
            (checkout / "example.py").write_text(next(b for b in fenced("python") if "Trainer(" in b))
        if elsewhere(command) is None:
            print(command)
            run(smaller(command), checkout)


@pytest.mark.slow
def test_the_recipe_of_your_own_is_one(checkout):
    """The README's my.yaml, with the corpus and the tokenizer that it speaks of."""
    (checkout / "my.yaml").write_text(next(b for b in fenced("yaml")))
    (checkout / "corpus").mkdir()
    (checkout / "corpus" / "mine.txt").write_text(README)
    run("python -m relora_ds prepare --config tiny prepared && cp -r prepared/tokenizer my_tokenizer", checkout)
    run("python -m relora_ds check my.yaml", checkout)


@pytest.mark.slow
def test_the_loop_of_your_own_runs(checkout):
    """The README's loop, after the model and the data that it leaves to the reader."""
    before = (
        "import torch\nfrom tests.small_models import llama\nmodel = llama()\n"
        "dataset = [{'input_ids': row, 'labels': row} for row in torch.randint(0, 67, (40, 16))]\n"
    )
    loop = next(b for b in fenced("python") if "relora_ds.initialize(" in b)
    (checkout / "loop.py").write_text(before + loop.replace("r=128", "r=4"))
    run("deepspeed --num_gpus 2 loop.py", checkout)
    assert (checkout / "out/model.safetensors").is_file()


@pytest.mark.slow
def test_a_model_without_values_is_filled(checkout):
    before = (
        "import relora_ds\nfrom tests.small_models import llama\n"
        "llama().save_pretrained('my_model')\n"
        "config = relora_ds.ReLoRAConfig(r=4, restart_every=10, restart_warmup_steps=2)\n"
    )
    block = next(b for b in fenced("python") if "model_without_values" in b)
    (checkout / "filled.py").write_text(before + block + "print(engine.collect_merged().keys())\n")
    run("python filled.py", checkout)
