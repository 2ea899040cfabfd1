"""The rank of what whole runs add to their weights; `python -m relora_ds spectrum`."""

import json
import shutil
import sys

import pytest
import torch
from transformers import GPT2Config

from relora_ds.__main__ import main
from relora_ds.checkpoint.model import Contents, open_model
from relora_ds.lab.experiments.update_spectra import OLDEST, WITH_INITIAL_VALUE, Window, linear_layers, measure
from relora_ds.models.build import meta_model
from tests.checkpoint.test_model import save
from tests.checkpoint.weights import weights_in
from tests.ranks import ranks
from tests.training.runs import run

R, WARM, LAST = 4, 10, 42  # the recipe tiny's r and warm start
SETTINGS = (
    f"train.steps={LAST}",
    "checkpoint.every=10",
    "checkpoint.keep_every=10",
    "checkpoint.keep_last=1",
    "eval.samples=0",
)
KINDS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = {
    "relora": ("relora.restart_every=8",),
    "lora": ("method=lora", "lora.base=warm_start", "relora.restart_every=null"),
    "full": ("method=full", "warm_start_steps=0", "relora.restart_every=null", "optim.lr=1e-3"),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of 42 steps with checkpoints at 10, 20, 30, 40 and 42; two of them with a warm start of 10."""
    folder = tmp_path_factory.mktemp("runs")
    for name, overrides in METHODS.items():
        run(folder / name, *SETTINGS, *overrides)
    return folder


@pytest.fixture
def without(runs, tmp_path):
    """A copy of a run that has not kept the checkpoints of these steps."""

    def copy(name: str, *steps: int):
        shutil.copytree(runs / name, tmp_path / name)
        for step in steps:
            shutil.rmtree(checkpoint(tmp_path / name, step))
        return tmp_path / name

    return copy


def checkpoint(run_dir, step: int):
    return run_dir / "checkpoints" / f"step_{step:08d}"


def ranks_by_kind(measured: dict) -> dict[str, float]:
    return {kind: about["numerical_rank"] for kind, about in measured["kinds"].items()}


def test_the_claim_of_the_paper(runs):
    """LoRA's update has rank r, ReLoRA's a higher one than two cycles could give, full rank's the highest."""
    result = measure([runs / name for name in METHODS])
    assert json.loads(json.dumps(result)) == result
    relora, lora, full = result["runs"]
    assert [
        (one["name"], one["method"], one["r"], one["restarts"], one["start"], one["stop"], one["note"])
        for one in result["runs"]
    ] == [
        ("relora", "relora", R, 3, WARM, LAST, ""),
        ("lora", "lora (warm_start base)", R, 0, WARM, LAST, ""),
        ("full", "full", None, 0, WARM, LAST, OLDEST),
    ]
    for one in result["runs"]:
        assert list(one["kinds"]) == KINDS
        for about in one["kinds"].values():
            assert about["num_matrices"] == 2 and about["is_exact"] and about["max_rank"] == 64
            assert about["num_values"] == sum(map(len, about["singular_values"])) == 128
            assert 1 <= about["stable_rank"] <= about["effective_rank"] <= 64
    for kind in KINDS:
        of = {one["name"]: one["kinds"][kind]["numerical_rank"] for one in result["runs"]}
        assert R / 2 < of["lora"] <= R and 2 * R < of["relora"] <= 4 * R and of["full"] > 40, (kind, of)
    assert lora["numerical_rank"] < relora["numerical_rank"] < full["numerical_rank"]


def test_one_matrix_at_a_time_is_the_whole_model(runs):
    for name, step in (("relora", WARM), ("relora", 40), ("lora", LAST)):
        directory = checkpoint(runs / name, step)
        merged = weights_in(directory)
        with open_model(directory) as model:
            for layer, shape in model.contents.matrices.items():
                weight = model.merged(layer)
                assert weight.shape == shape and torch.equal(weight, merged[f"{layer}.weight"])
                weight.zero_()
                assert torch.equal(model.merged(layer), merged[f"{layer}.weight"]), "it was the file's own memory"


def test_a_run_that_never_restarted_needs_no_earlier_checkpoint(runs, without):
    """`s·B·A` is all that its low-rank phase added, and what the difference of its weights shows."""
    [difference], [factors] = (measure([path])["runs"] for path in (runs / "lora", without("lora", 10, 20, 30, 40)))
    assert difference["before"] == str(checkpoint(runs / "lora", WARM)) and factors["before"] is None
    assert (factors["start"], factors["stop"], factors["note"]) == (WARM, LAST, "")
    for kind in KINDS:
        for mine, theirs in zip(
            factors["kinds"][kind]["singular_values"], difference["kinds"][kind]["singular_values"], strict=True
        ):
            assert mine[:R] == pytest.approx(theirs[:R], rel=2e-3) and max(mine[R:]) < 1e-5 * mine[0]


@pytest.mark.parametrize(
    "changes",
    [
        ("method=switchlora", "switchlora.interval=2"),
        ("method=galore", "relora.restart_every=null", "relora.residual_every=3"),
    ],
    ids=["switches", "residual updates"],
)
def test_updates_that_change_weights_without_a_restart_count(changes, tmp_path):
    """More than `s·B·A` has been added: a difference of two checkpoints alone tells what."""
    few = ("train.steps=12", "warm_start_steps=0", "checkpoint.every=4", "checkpoint.keep_every=4", "eval.samples=0")
    run(tmp_path / "run", *few, "optim.warmup_steps=2", "relora.r=4", "relora.frozen_dtype=fp32", *changes)
    [found] = measure([tmp_path / "run"])["runs"]
    assert (found["restarts"], found["start"], found["stop"], found["note"]) == (0, 4, 12, OLDEST)
    assert found["before"] == str(checkpoint(tmp_path / "run", 4)) and min(ranks_by_kind(found).values()) > R


def test_where_an_update_begins(without):
    copy = without("relora", WARM)
    [oldest] = measure([copy])["runs"]
    assert (oldest["start"], oldest["note"]) == (20, OLDEST)
    assert measure([copy], before="30")["runs"][0]["start"] == 30
    [earlier] = measure([checkpoint(copy, 40)], before=str(checkpoint(copy, 30)))["runs"]
    assert (earlier["start"], earlier["stop"]) == (30, 40)
    assert max(ranks_by_kind(earlier).values()) <= 3 * R, "the cycles of 30 and 40, and the end of 30's"
    with pytest.raises(ValueError, match="--before: 10, but .* has no step_00000010; there are step_00000020, "):
        measure([copy], before="10")
    with pytest.raises(ValueError, match="--before: 42 is the checkpoint that the update ends with"):
        measure([copy], before="42")


def test_without_an_earlier_checkpoint_it_says_what_to_do(without):
    copy = without("relora", 10, 20, 30, 40)
    with pytest.raises(ValueError, match="no earlier checkpoint of its run is kept.*keep_every=10.*--before"):
        measure([copy])


def test_lora_without_a_base(tmp_path):
    """Its weight is `s·B·A` itself: minus that of the oldest checkpoint, else whole."""
    run(
        tmp_path / "r",
        *SETTINGS,
        "method=lora",
        "lora.base=none",
        "relora.restart_every=null",
        "warm_start_steps=0",
        "train.steps=14",
    )
    [difference] = measure([tmp_path / "r"])["runs"]
    assert (difference["start"], difference["note"]) == (10, OLDEST)
    assert all(R < rank <= 2 * R for rank in ranks_by_kind(difference).values())
    shutil.rmtree(checkpoint(tmp_path / "r", 10))
    [whole] = measure([tmp_path / "r"])["runs"]
    assert (whole["start"], whole["before"], whole["note"]) == (0, None, WITH_INITIAL_VALUE)
    assert set(ranks_by_kind(whole).values()) == {R}


def test_a_full_rank_run_alone_and_one_of_another_network(runs, tmp_path):
    [full] = measure([runs / "full"])["runs"]
    assert list(full["kinds"]) == KINDS, "all linear layers, and neither embeddings nor head"
    run(tmp_path / "other", *SETTINGS, *METHODS["full"], "train.steps=4", "model.preset=llama_9m")
    with pytest.raises(ValueError, match=r"of another network than .*q_proj is \(128, 128\) there and \(64, 64\) here"):
        measure([runs / "full"], before=str(tmp_path / "other"))


def test_gpt_2s_matrices_are_linear_layers_too(tmp_path):
    config = GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=6)
    config.save_pretrained(tmp_path)
    parameters = meta_model(config).named_parameters()
    matrices = {name.removesuffix(".weight"): p.shape for name, p in parameters if p.ndim == 2}
    window = Window(tmp_path, Contents(1, 1, [], None, {}, matrices), tmp_path)
    assert linear_layers(window, wrapped=set()) == [
        f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    ]


def test_checkpoints_in_deepspeeds_format(tmp_path):
    """Of a loop of one's own, which restarts after step 4; and of a full-rank model of another family."""
    ranks(2).run(save, 2, "bf16", str(tmp_path / "low"))
    [first] = measure([tmp_path / "low" / "2"])["runs"]
    assert (first["before"], first["start"], first["stop"], first["r"]) == (None, 0, 2, R)
    [both] = measure([tmp_path / "low" / "6"], before=str(tmp_path / "low" / "0"))["runs"]
    assert both["restarts"] == 1 and set(ranks_by_kind(first).values()) == {R}
    assert all(R < rank <= 2 * R for rank in ranks_by_kind(both).values()), ranks_by_kind(both)
    with pytest.raises(ValueError, match="no earlier checkpoint"):
        measure([tmp_path / "low" / "6"])
    ranks(2).run(save, 1, "fp32", str(tmp_path / "full"), relora=None, family="gpt_neox")
    [full] = measure([tmp_path / "full" / "6"], before=str(tmp_path / "full" / "0"))["runs"]
    assert list(full["kinds"]) == ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    assert min(ranks_by_kind(full).values()) > 2 * R


def test_the_command(runs, capsys):
    assert main(["spectrum", str(runs / "relora"), str(runs / "full"), "--before", "20"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "relora: relora, r 4, restarts 3; step 20 to 42" in lines and "full: full; step 20 to 42" in lines
    [head, *rows] = [line.split() for line in lines if line.startswith("  ")][:9]
    assert head[:2] == ["layers", "matrices"] and [row[0] for row in rows] == [*KINDS, "all"]
    assert rows[0][1:3] == ["2", "64"] and rows[-1][1] == "14"
    assert main(["spectrum", str(runs / "full"), "--json"]) == 0
    [only] = json.loads(capsys.readouterr().out)["runs"]
    assert only["kinds"]["q_proj"]["num_values"] == 128


def test_its_figures(runs, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="the extra .[plot]")
    assert main(["spectrum", str(runs / "relora"), str(runs / "lora"), "--out", str(tmp_path / "out")]) == 0
    files, printed = sorted((tmp_path / "out").iterdir()), capsys.readouterr().out
    assert [path.name for path in files] == ["singular_values.png", "singular_values_sorted.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and str(path) in printed for path in files)


def test_without_matplotlib_it_says_what_to_install(runs, tmp_path, capsys, monkeypatch):
    for name in [
        name
        for name in sys.modules
        if name.startswith("relora_ds.lab.figures") or name.partition(".")[0] == "matplotlib"
    ]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["spectrum", str(runs / "lora"), "--out", str(tmp_path / "out")]) == 1
    assert "--out draws with matplotlib, which is not installed: pip install '.[plot]'" in capsys.readouterr().err
    assert main(["spectrum", str(runs / "lora")]) == 0


def test_what_is_no_run_is_one_line(tmp_path, capsys):
    assert main(["spectrum", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: neither a run of relora_ds nor a checkpoint; ")
