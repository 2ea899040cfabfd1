"""`bench quality`: what is trained, what is not trained again, what is compared with what."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from relora_ds.config import load_recipe, method_of
from relora_ds.lab.bench import quality

# tiny, on Python's own documentation: nothing is downloaded
TINY = [
    "data.source=pydocs",
    "model.preset=tiny",
    "data.vocab_size=512",
    "data.seq_len=32",
    "train.steps=12",
    "warm_start_steps=4",
    "relora.restart_every=4",
    "relora.restart_warmup_steps=1",
    "relora.r=4",
    "optim.warmup_steps=1",
    "log.every=1",
]


def compare(runs: Path, *argv: str) -> dict:
    parser = argparse.ArgumentParser()
    quality.add_arguments(parser)
    return quality.run(parser.parse_args(["--runs", str(runs), *argv]))


class Trainings:
    """Stands for `subprocess.run`: leaves what a run leaves, and counts."""

    def __init__(self):
        self.directories: list[str] = []
        self.failing: set[str] = set()

    def __call__(self, command, **_):
        overrides = command[command.index("--config") + 2 :]
        recipe = load_recipe(quality.RECIPE, overrides)
        directory = Path(recipe.run_dir)
        self.directories.append(directory.name)
        if directory.name in self.failing:
            return SimpleNamespace(returncode=3)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "recipe.yaml").write_text(recipe.to_yaml())
        loss = {"bf16": 4.0, "nf4": 4.04, "int8": 3.98}[recipe.relora.frozen_dtype] + recipe.seed
        lines = [
            {"kind": "eval", "step": 6, "val_loss": loss + 1},
            {"kind": "eval", "step": 12, "val_loss": loss},
            {"kind": "restart", "step": 8, "merge_loss": 0.1, "merge_loss_total": 0.2},
        ]
        (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (directory / "summary.json").write_text(
            json.dumps({"val_loss": loss, "val_tokens": 99, "tokens": 3072, "step": 12, "restarts": 1, "seconds": 1.0})
        )
        return SimpleNamespace(returncode=0)


@pytest.fixture
def trainings(monkeypatch, tmp_path):
    (tmp_path / "validation.jsonl").write_text('{"text": "as if WikiText-2 had been downloaded"}\n')
    trainings = Trainings()
    monkeypatch.setattr(quality.subprocess, "run", trainings)
    return trainings


def test_each_seed_is_compared_with_the_reference_of_the_same_seed(tmp_path, trainings):
    result = compare(tmp_path, "--seeds", "2", "--variants", "nf4", "int8", "--jobs", "2")
    assert sorted(trainings.directories) == sorted(
        f"{name}_seed{seed}" for name in ("bf16", "nf4", "int8") for seed in (0, 1)
    )
    nf4 = result["variants"]["nf4"]
    assert nf4["difference_percent_by_seed"] == pytest.approx([1.0, 0.8])
    assert nf4["difference_percent"] == pytest.approx(0.9) and nf4["val_loss"] == pytest.approx(4.54)
    assert nf4["merge_loss_total"] == 0.2
    assert nf4["runs"][1]["curve"] == [[1536.0, 6.04], [3072.0, 5.04]]
    assert "| nf4 | 4.0400 5.0400 | 4.5400 | +1.00 % +0.80 % | +0.90 % | 20 % |" in quality.markdown(result)


def test_what_is_finished_is_not_trained_again(tmp_path, trainings):
    trainings.failing = {"nf4_seed0"}
    with pytest.raises(ValueError, match="nf4_seed0: exit code 3; see"):
        compare(tmp_path, "--seeds", "1", "--variants", "nf4", "int8")
    assert trainings.directories == ["bf16_seed0", "nf4_seed0", "int8_seed0"]  # one failure does not stop the others
    trainings.failing, trainings.directories = set(), []
    compare(tmp_path, "--seeds", "1", "--variants", "nf4", "int8")
    assert trainings.directories == ["nf4_seed0"]


def test_runs_with_other_settings_are_refused(tmp_path, trainings):
    compare(tmp_path, "--seeds", "1", "--variants", "nf4")
    with pytest.raises(ValueError, match="bf16_seed0 is a run with other settings; use another directory"):
        compare(tmp_path, "optim.lr=1e-3", "--seeds", "1", "--variants", "nf4")


def test_runs_of_other_lengths_are_no_comparison():
    one = {"tokens": 10, "val_tokens": 5, "restarts": 1, "val_loss": 4.0, "merge_loss_total": None}
    with pytest.raises(ValueError, match=r"the runs differ in tokens \(10, 20\)"):
        quality.compare({"bf16": [one], "nf4": [{**one, "tokens": 20}]})


def test_all_variants_see_the_same_tokens():
    recipes = [load_recipe(quality.RECIPE, [*quality.SETTINGS, *overrides]) for overrides in quality.VARIANTS.values()]
    for recipe in recipes:
        recipe.relora.frozen_dtype, recipe.relora.frozen_master = "auto", "cpu"
        recipe.relora.frozen_double_quant = False
    assert all(recipe == recipes[0] for recipe in recipes)
    assert method_of(recipes[0]).num_restarts >= 5 and recipes[0].warm_start_steps > 0


@pytest.mark.slow
def test_real_runs_and_their_figure(tmp_path):
    pytest.importorskip("bitsandbytes", reason="the extra .[quantization]")
    pytest.importorskip("matplotlib", reason="the extra .[plot]")
    figure = tmp_path / "figures" / "quality.png"
    result = compare(tmp_path / "runs", *TINY, "--seeds", "1", "--variants", "nf4", "--figure", str(figure))
    assert (result["restarts"], result["tokens"]) == (1, 12 * 8 * 32)
    nf4, bf16 = (result["variants"][name] for name in ("nf4", "bf16"))
    assert nf4["val_loss"] == pytest.approx(bf16["val_loss"], rel=0.02) and nf4["val_loss"] != bf16["val_loss"]
    assert nf4["merge_loss_total"] > bf16["merge_loss_total"] > 0
    assert figure.read_bytes().startswith(b"\x89PNG")
