"""Every fenced command of the README and of the guides runs, in one folder and in the order in which they are read.

They run as written, but for what `SMALLER` says: two ranks instead of eight, and runs of minutes instead of days. The
commands of all pages, also those that measure for hours, are at least understood by the command that they call.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.docs import cli
from tests.docs.pages import DOCS, PAGES, ROOT, commands, fenced, name_of

README = ROOT / "README.md"


class _Loader(yaml.SafeLoader):
    """Read mkdocs.yml, whose tags name Python objects, as plain data."""


_Loader.add_multi_constructor("tag:yaml.org,2002:python/", lambda loader, suffix, node: None)
NAVIGATION = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), _Loader)["nav"]
(GUIDES,) = (section["Guides"] for section in NAVIGATION if "Guides" in section)
READ = [
    README,
    *(DOCS / path for group in GUIDES for pages in group.values() for page in pages for path in page.values()),
]

# A command of ours at the beginning of a line, after launchers and variables: its name and the rest.
CALL = re.compile(r"^(?: {4})?(?:[\w=/.-]+ )*?(?:-m relora_ds|--module relora_ds|relora) (\w+) ?(.*)$", re.MULTILINE)

# A real recipe's shape at a size for two CPU cores; its own sizes are in tests/config/test_recipes.py.
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
    (r"(train\.py --config quickstart run_dir=\S+)", rf"\1 {TINY} data.seq_len=64 relora.residual_every=2"),
    (r"(test\.sh)\b.*", r"\1 tests/config/test_config.py -q"),
    (r"(reproduce .*--scale small) --num-gpus 1", r"\1 --dry-run"),
]
# What cannot run here, and the test that runs the same script.
ELSEWHERE = {
    "pip install": "tests/test_new_user.py",
    "deepspeed --num_gpus 8 my_loop.py": "tests/docs/test_commands.py",  # test_the_loop_of_your_own_runs
    "bash launch_scripts/multi_node.sh": "tests/launch/test_two_nodes.py",
    "relora islands serve": "tests/islands/test_serve.py",  # it serves until it is told to end
    "relora eval runs/quickstart --tasks": "tests/training/test_tasks.py",
    "sbatch": "tests/launch/test_slurm.py",
    "docker": "tests/launch/test_image.py",
    "kubectl": "tests/launch/test_kubeflow.py",
    "sky": "tests/launch/test_skypilot.py",
    "tensorboard": "tests/training/test_observability.py",
    "bash launch_scripts/docs.sh": "tests/docs/test_site.py",
}


def elsewhere(command: str) -> str | None:
    return next((test for start, test in ELSEWHERE.items() if command.startswith(start)), None)


def smaller(command: str) -> str:
    for pattern, replacement in SMALLER:
        command = re.sub(pattern, replacement, command)
    return command


def all_commands() -> list[str]:
    return [command for page in READ for command in commands(page)]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout with what the reader has: `relora`, a model of theirs, and documents."""
    folder = tmp_path_factory.mktemp("reader") / "relora_ds"
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "runs", "plots", "site", ".*_cache")
    shutil.copytree(ROOT, folder, ignore=ignored)
    (folder / "bin").mkdir()
    (folder / "bin" / "relora").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m relora_ds "$@"\n')
    (folder / "bin" / "relora").chmod(0o755)
    run(
        'python -c "from transformers import AutoTokenizer; from tests.small_models import llama; '
        "llama(vocab_size=600, hidden_size=64, intermediate_size=128, max_position_embeddings=2048).save_pretrained("
        "'my_model')\"",
        folder,
    )
    return folder


@pytest.fixture(scope="module")
def done() -> set[str]:
    """The commands that have been run: two pages may have the same one."""
    return set()


def run(command: str, folder: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    environment |= {
        "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(folder),
        "HF_HUB_OFFLINE": "1",
        "VIRTUAL_ENV": sys.prefix,
    }
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=1500
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    return done.stdout


def test_what_is_not_run_here_is_run_elsewhere():
    assert len(all_commands()) > 30
    for start, test in ELSEWHERE.items():
        assert any(command.startswith(start) for command in all_commands()), start
        assert (ROOT / test).is_file()


@pytest.mark.parametrize("page", [README, *(page for page in PAGES if page.name != "cli.md")], ids=name_of)
def test_every_command_of_ours_is_understood(page, capsys):
    """Also those that no test can run: names and options are those that the command has."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    for name, words in CALL.findall(text):
        try:
            cli.parser_of(name).parse_intermixed_args(shlex.split(words.partition(" #")[0]))
        except SystemExit:
            pytest.fail(f"{name} {words}\n{capsys.readouterr().err}")


@pytest.mark.slow
@pytest.mark.parametrize("page", READ, ids=name_of)
def test_every_command_runs(page, checkout, done):
    for command in commands(page):
        if "my_train.py" in command:
            (checkout / "my_train.py").write_text(next(iter(fenced(page, "python"))))
        if "example.py" in command:
            train, resume, *_ = fenced(page, "python")
            (checkout / "example.py").write_text(train + resume)
        if elsewhere(command) is None and command not in done:
            print(command)
            said = run(smaller(command), checkout)
            done.add(command)
            if "quickstart.sh" in command:
                assert "The perplexity went from" in said and (checkout / "runs/quickstart/plots/loss.png").is_file()


@pytest.mark.slow
def test_the_recipe_of_your_own_is_one(checkout):
    """The guide's my.yaml, with the corpus and the tokenizer that it speaks of."""
    (checkout / "my.yaml").write_text(next(iter(fenced(DOCS / "guides/train.md", "yaml"))))
    (checkout / "corpus").mkdir()
    (checkout / "corpus" / "mine.txt").write_text(README.read_text(encoding="utf-8"))
    run("relora prepare --config tiny prepared && cp -r prepared/tokenizer my_tokenizer", checkout)
    run("relora check my.yaml", checkout)


@pytest.mark.slow
@pytest.mark.parametrize("page", [README, DOCS / "guides/own_loop.md"], ids=name_of)
def test_the_loop_of_your_own_runs(page, checkout):
    """The loop, after the model and the data that the page leaves to the reader."""
    before = (
        "import torch\nfrom tests.small_models import llama\nmodel = llama()\n"
        "dataset = [{'input_ids': row, 'labels': row} for row in torch.randint(0, 67, (40, 16))]\n"
    )
    loop = next(b for b in fenced(page, "python") if "relora_ds.initialize(" in b)
    (checkout / "loop.py").write_text(before + loop.replace("r=128", "r=4"))
    shutil.rmtree(checkout / "out", ignore_errors=True)
    run("deepspeed --num_gpus 2 loop.py", checkout)
    assert (checkout / "out/model.safetensors").is_file()


@pytest.mark.slow
def test_galore_through_the_trainer(checkout):
    """The guide's script, with the config of its section on GaLore."""
    train, *others = fenced(DOCS / "guides/hf_trainer.md", "python")
    (config,) = (block for block in others if "optimizer_reset" in block)
    (checkout / "galore.py").write_text(re.sub(r"^config = .*\n", lambda _: config, train, flags=re.MULTILINE))
    said = run("deepspeed --num_gpus 2 galore.py", checkout)
    assert said.count("'restarts': ") == 2


@pytest.mark.slow
def test_a_model_without_values_is_filled(checkout):
    before = (
        "import relora_ds\nfrom tests.small_models import llama\n"
        "llama().save_pretrained('my_model')\n"
        "config = relora_ds.ReLoRAConfig(r=4, restart_every=10, restart_warmup_steps=2)\n"
    )
    block = next(b for b in fenced(DOCS / "guides/own_loop.md", "python") if "model_without_values" in b)
    (checkout / "filled.py").write_text(before + block + "print(engine.collect_merged().keys())\n")
    run("python filled.py", checkout)


@pytest.mark.slow
def test_a_cola_network_of_your_own_becomes_an_engine(checkout):
    block = next(b for b in fenced(DOCS / "guides/models.md", "python") if "ReLoRACoLAConfig" in b)
    (checkout / "factors.py").write_text(block + "print(engine.module.config.cola_r)\n")
    assert run("python factors.py", checkout).splitlines()[-1] == "128"


@pytest.mark.slow
def test_a_run_is_loaded(checkout):
    """As docs/guides/export.md does; the README's quickstart has been run before."""
    (block,) = fenced(DOCS / "guides/export.md", "python")
    (checkout / "load.py").write_text(block)
    said = run("python load.py", checkout)  # DeepSpeed may warn of the device
    assert float(said.splitlines()[-1]) > 0
