"""`init_from`: a run, a checkpoint, a Hugging Face model, a PEFT export; needed at the start of a run only."""

import shutil

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from relora_ds.interop.hf_export import export
from relora_ds.interop.sources import weights_of
from relora_ds.train import main
from tests.training.runs import lines, losses, run

# Nothing moves: the first evaluation is that of the weights it began with.
STILL = ("warm_start_steps=0", "train.steps=4", "optim.lr=1e-12", "relora.restart_every=null", "eval.every=4")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run with checkpoints at 8, 16, 24, …; a restart at 20."""
    directory = tmp_path_factory.mktemp("runs") / "first"
    run(directory, "checkpoint.every=8", "checkpoint.keep_last=9", "eval.every=8", "train.steps=28")
    return directory


@pytest.mark.parametrize(
    "kind, step",
    [
        ("run", 28),
        pytest.param("unfinished", 24, marks=pytest.mark.slow),
        ("checkpoint", 16),
        ("warm_start", 8),
        pytest.param("export", 28, marks=pytest.mark.slow),
        ("peft", 24),
    ],
)
def test_a_run_starts_where_they_left_off(first, tmp_path, kind, step):
    source = {
        "run": first,
        "unfinished": tmp_path / "unfinished",
        "export": first / "export",
        "checkpoint": first / "checkpoints" / "step_00000016",
        "peft": tmp_path / "peft",
        "warm_start": first / "checkpoints" / "step_00000008",
    }[kind]
    if kind == "unfinished":
        shutil.copytree(first, source)
        shutil.rmtree(source / "export")
        (source / "checkpoints" / "latest").write_text("step_00000024")
    elif kind == "peft":
        export(first, source, format="peft", checkpoint="step_00000024")
    run(tmp_path / "next", f"init_from={source}", *STILL)
    [expected] = [line["val_loss"] for line in lines(first, "eval") if line["step"] == step]
    assert lines(tmp_path / "next", "eval")[-1]["val_loss"] == pytest.approx(expected, rel=1e-6)


def test_they_are_the_weights_to_the_bit(first, tmp_path):
    weights = weights_of(str(first / "checkpoints" / "step_00000028"))
    exported = load_file(first / "export" / "model.safetensors")
    assert set(weights.shapes) == set(exported)
    assert all(torch.equal(weights.read(name), exported[name]) for name in exported)


@pytest.mark.parametrize(
    "model",
    [(), ("model.preset=null", "model.name_or_path={base}", "model.init=pretrained", "data.tokenizer={base}")],
    ids=["init_from", "pretrained"],
)
def test_a_resume_needs_it_no_more(first, tmp_path, model):
    base, settings = tmp_path / "base", ("warm_start_steps=0", "checkpoint.every=9", "train.steps=18", "precision=bf16")
    export(first, base)
    model = [setting.format(base=base) for setting in model] or [f"init_from={base}"]
    run(tmp_path / "whole", *model, *settings)
    for path in base.glob("*.safetensors"):
        path.unlink()
    if model == [f"init_from={base}"]:
        shutil.rmtree(base)
    resumed = tmp_path / "resumed"
    run(resumed, *model, *settings, f"resume={tmp_path}/whole/checkpoints/step_00000009")
    whole = losses(tmp_path / "whole")
    assert losses(resumed) == {step: whole[step] for step in range(10, 19)}
    ours, theirs = (load_file(d / "export" / "model.safetensors") for d in (resumed, tmp_path / "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def fails(tmp_path, capfd):
    def start(source, *overrides: str) -> str:
        assert (
            main(
                [
                    "--config",
                    "tiny",
                    f"run_dir={tmp_path / 'run'}",
                    f"init_from={source}",
                    "warm_start_steps=0",
                    *overrides,
                ]
            )
            == 2
        )
        assert not (tmp_path / "run").exists() and not dist.is_initialized()
        return capfd.readouterr().err

    return start


def test_what_cannot_be_read_is_a_mistake_in_the_recipe(fails, first, tmp_path):
    assert "init_from: ./no/such/place does not exist" in fails("./no/such/place")
    assert "init_from: no/such/place does not exist" in fails("no/such/place")
    (tmp_path / "weights.pt").write_bytes(b"pickle")
    assert "is no directory" in fails(tmp_path / "weights.pt")
    (tmp_path / "empty").mkdir()
    assert "neither a run, a checkpoint, a Hugging Face model nor a PEFT export" in fails(tmp_path / "empty")
    (tmp_path / "young").mkdir()
    (tmp_path / "young" / "recipe.yaml").write_text("method: relora\n")
    assert "the run has no checkpoint" in fails(tmp_path / "young")
    # together with the recipe's other mistakes
    printed = fails(tmp_path / "empty", "relora.r=65")
    assert "init_from: " in printed and "relora.r: 65" in printed
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    assert f"init_from: {tmp_path / 'broken'} cannot be loaded" in fails(tmp_path / "broken")


@pytest.fixture
def damaged(first, tmp_path):
    """Copies of the run's model with other weights."""

    def copy(name: str, change) -> str:
        directory = shutil.copytree(first / "export", tmp_path / name)
        path = directory / "model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path, metadata={"format": "pt"})
        return str(directory)

    return copy


def test_weights_that_do_not_fit_are_a_mistake_in_the_recipe(fails, damaged):
    key = "model.layers.1.mlp.up_proj.weight"
    lacks = damaged("lacks", lambda weights: weights.pop(key))
    assert f"init_from: {lacks} cannot be loaded" in (said := fails(lacks)) and f"(first: {key})" in said
    shape = damaged("shape", lambda weights: weights.update({key: torch.zeros(3, 5)}))
    assert f"init_from: {shape} cannot be loaded ({key} is (3, 5) there instead of" in fails(shape)
    short = damaged("short", lambda weights: None)
    with open(f"{short}/model.safetensors", "r+b") as file:
        file.truncate(5000)
    assert f"init_from: {short} cannot be loaded" in fails(short)


def test_pretrained_weights_that_do_not_fit_are_a_mistake_in_the_recipe(first, damaged, tmp_path, capfd):
    lacks = damaged("lacks", lambda weights: weights.pop("model.norm.weight"))
    assert (
        main(
            [
                "--config",
                "tiny",
                f"run_dir={tmp_path / 'run'}",
                "model.init=pretrained",
                "warm_start_steps=0",
                "model.preset=null",
                f"model.name_or_path={lacks}",
                f"data.tokenizer={lacks}",
            ]
        )
        == 2
    )
    assert f"model.name_or_path: {lacks} cannot be loaded" in capfd.readouterr().err
    assert not (tmp_path / "run").exists()


def test_another_model_is_named_before_anything_is_built(fails, first):
    assert (
        "holds another model than the recipe's: model.embed_tokens.weight is (512, 64) there and (400, 64) here"
        in fails(first, "data.vocab_size=400")
    )
    assert "(512, 64) there and (512, 128) here" in fails(
        first / "checkpoints" / "step_00000008", "model.preset=llama_9m"
    )


def test_an_adapter_on_another_base(fails, first, tmp_path):
    for step in ("step_00000016", "step_00000024"):
        export(first, tmp_path / step, format="peft", checkpoint=step)
    shutil.rmtree(tmp_path / "step_00000024" / "base")
    shutil.copytree(tmp_path / "step_00000016" / "base", tmp_path / "step_00000024" / "base")
    assert "the base has moved on" in fails(tmp_path / "step_00000024")
