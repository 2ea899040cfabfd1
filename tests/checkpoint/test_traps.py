"""What would be lost without a word: each was, once."""

import json
import shutil

import pytest
import torch.distributed as dist
from transformers import LlamaConfig

from relora_ds.checkpoint import store
from relora_ds.checkpoint.contents import Captured
from relora_ds.checkpoint.find import ResumeError, find
from relora_ds.training.preflight import check
from relora_ds.training.trainer import Trainer
from tests.ranks import ranks
from tests.training.runs import AfterStep, lines, losses, run

SETTINGS = ("train.steps=36", "checkpoint.every=6", "checkpoint.keep_last=99", "eval.samples=0")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "whole"
    run(directory, *SETTINGS, "precision=bf16", "relora.frozen_master=none")
    return directory


def test_masters_begin_with_what_was_stored(whole, tmp_path):
    """They were those of a random network, and the next restart merged into them."""
    run(
        tmp_path / "r",
        *SETTINGS,
        "precision=bf16",
        "relora.frozen_master=cpu",
        f"resume={whole}/checkpoints/step_00000018",
    )
    assert [line["step"] for line in lines(tmp_path / "r", "restart")] == [20, 30]
    for step, loss in losses(tmp_path / "r").items():
        assert loss == pytest.approx(losses(whole)[step], rel=0.01), step


def captured(ranges: dict, frozen: dict | None) -> Captured:
    return Captured(
        {},
        ranges,
        frozen,
        {},
        {
            "parameters": {"a": {"shape": [4, 5], "trains": True}, "w.weight": {"shape": [9], "trains": False}},
            "layers": {"w": {"base": True}},
        },
    )


@pytest.mark.parametrize(
    ("contents", "gap"),
    [
        ([({"a": (0, 12)}, ["w.weight"]), ({"a": (12, 20)}, [])], None),
        ([({"a": (0, 20)}, ["stored/w.weight"]), ({"a": (0, 20)}, [])], None),
        ([({"a": (0, 12)}, ["w.weight"]), ({"a": (13, 20)}, [])], "no rank has written all of a"),
        ([({"a": (0, 12)}, ["w.weight"]), ({}, [])], "no rank has written all of a"),
        ([({"a": (0, 20)}, []), ({}, [])], "no rank has written w.weight"),
    ],
)
def test_a_checkpoint_has_all_of_everything(contents, gap):
    assert captured({}, {}).gaps(contents) == gap


def test_a_cycle_whose_files_vanished_is_written_again(whole, tmp_path):
    """They were taken for another host's, and every checkpoint of the cycle lacked them; then one of them failed."""
    shutil.copytree(whole, tmp_path / "other")
    ranks(2).run(train_and_lose, str(tmp_path / "r"), str(tmp_path / "other" / "checkpoints" / "step_00000012"))
    saved = store.directories(tmp_path / "r")
    assert [path.name for path in saved] == ["step_00000018", "step_00000024", "step_00000030", "step_00000036"]
    assert [store.verify(path) for path in saved] == [[], [], [], []]
    assert all(any(path.glob("frozen_*")) for path in saved)


def train_and_lose(run_dir: str, checkpoint: str) -> None:
    def losing(state):
        if state.step == 16 and dist.get_rank() == 0:
            shutil.rmtree(checkpoint)

    plan = check(
        "tiny",
        [f"run_dir={run_dir}", f"resume={checkpoint}", *SETTINGS, "precision=bf16", "relora.frozen_master=none"],
    )
    Trainer(plan, [AfterStep(losing)]).fit()


def find_on_disks_of_their_own(directories: list[str]) -> tuple | str:
    try:
        found = find(directories[dist.get_rank()], "auto")
    except ResumeError as error:
        return str(error)
    return found.directory.name, found.passed_over


def test_hosts_that_were_stopped_between_two_renames(whole, tmp_path):
    """The newest checkpoint that all of them have serves."""
    copies = [shutil.copytree(whole, tmp_path / name) for name in ("host_0", "host_1")]
    shutil.rmtree(copies[1] / "checkpoints" / "step_00000036")
    for name, passed_over in ranks(2).run(find_on_disks_of_their_own, copies):
        assert name == "step_00000030" and "step_00000036 is not on every host" in passed_over


def test_what_is_damaged_is_put_aside_and_not_deleted(whole, tmp_path):
    directory = shutil.copytree(whole, tmp_path / "r")
    (directory / "checkpoints" / "step_00000036" / "manifest.json").write_text("{}")
    with (directory / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe{"kind": "tr')  # and a line that was cut off
    run(directory, *SETTINGS, "precision=bf16", "relora.frozen_master=none", "resume=auto")
    assert (directory / "checkpoints" / "step_00000036.damaged" / "manifest.json").read_text() == "{}"
    assert losses(directory) == losses(whole)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        attention_dropout=0.1,
    ).save_pretrained(directory)
    return directory


def test_dropout_of_the_model_itself_is_the_same_after_a_resume(model, tmp_path):
    settings = (*SETTINGS, f"model.name_or_path={model}", "precision=fp32")
    run(tmp_path / "whole", *settings)
    for step in (6, 24):
        run(tmp_path / str(step), *settings, f"resume={tmp_path}/whole/checkpoints/step_{step:08d}")
        assert losses(tmp_path / str(step)) == {s: x for s, x in losses(tmp_path / "whole").items() if s > step}
    # A network of the same shapes that computes something else.
    content = json.loads((model / "config.json").read_text()) | {"num_attention_heads": 8, "num_key_value_heads": 8}
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps(content))
    with pytest.raises(AssertionError, match="num_attention_heads was 4, is 8"):
        run(
            tmp_path / "r",
            *settings[:-2],
            f"model.name_or_path={other}",
            "precision=fp32",
            f"resume={tmp_path}/whole/checkpoints/step_00000024",
        )


def test_a_run_that_is_made_longer_restarts_where_it_ended(tmp_path):
    run(tmp_path / "r", "train.steps=40")
    run(tmp_path / "r", "train.steps=56", "resume=auto")
    assert [line["step"] for line in lines(tmp_path / "r", "restart")] == [20, 30, 40, 50]
    assert [line["restarts"] for line in lines(tmp_path / "r", "restart")] == [1, 2, 3, 4]
