"""DeepSpeed's universal checkpoints drop the frozen weights; ours, copied along, bring them back."""

import shutil
import sys
from unittest import mock

import pytest
import torch.distributed as dist

import relora_ds
from tests.parity import cases
from tests.ranks import ranks
from tests.zero.test_checkpoint import END, EVERY, SAVED_AT, build, train
from tests.zero.test_nonfinite import everything

TAG = f"global_step{SAVED_AT}"


def save(stage: int, precision: str, directory: str) -> list[float]:
    engine = build(stage, precision)
    train(engine, 0, SAVED_AT)
    engine.save_checkpoint(directory, client_state={"mine": 7})
    losses = train(engine, SAVED_AT, END)
    cases.release(engine)
    return losses


def convert(directory: str) -> None:
    from deepspeed.checkpoint import ds_to_universal

    arguments = [
        "",
        "--input_folder",
        f"{directory}/{TAG}",
        "--output_folder",
        f"{directory}/{TAG}_universal",
        "--num_extract_workers",
        "1",
        "--num_merge_workers",
        "1",
        "--inject_missing_state",
    ]
    with mock.patch.object(sys, "argv", arguments):
        ds_to_universal.main(ds_to_universal.parse_arguments())


def load(stage: int, precision: str, directory: str) -> dict:
    relora = cases.relora_config(restart_every=EVERY, restart_warmup_steps=2)
    model = relora_ds.wrap(cases.FAMILIES["llama"](1), relora, seed=0)
    engine, *_ = relora_ds.initialize(
        model=model,
        config=cases.ds_settings(stage, precision, False) | {"checkpoint": {"load_universal": True}},
        relora=relora,
        lr=cases.LR,
        total_steps=cases.STEPS,
        warmup_steps=cases.WARMUP,
        min_lr_ratio=cases.MIN_RATIO,
        weight_decay=cases.DECAY,
        precision=precision,
        micro_batch_size=cases.GLOBAL_BATCH // dist.get_world_size(),
        max_grad_norm=cases.CLIP,
    )
    before = everything(engine)
    try:
        _, client_state = engine.load_checkpoint(directory)
    except ValueError as error:
        changed = [what for what, value in everything(engine).items() if value != before[what]]
        cases.release(engine)
        return {"refused": str(error), "changed": changed}
    result = {
        "client_state": client_state,
        "t": engine.t,
        "losses": train(engine, SAVED_AT, END),
        "restarts": list(engine.restarts),
    }
    cases.release(engine)
    return result


@pytest.mark.parametrize(
    ("saved", "loaded", "precision", "world_size"),
    [(1, 3, "bf16", 2), (3, 2, "fp32", 1), pytest.param(2, 0, "bf16", 2, marks=pytest.mark.slow)],
)
def test_it_goes_on_elsewhere_through_the_next_restart(tmp_path, saved, loaded, precision, world_size):
    losses = ranks(2).run(save, saved, precision, str(tmp_path))[0]
    ranks(1).run(convert, str(tmp_path))
    for result in ranks(world_size).run(load, loaded, precision, str(tmp_path)):
        assert "copy them there" in result["refused"] and result["changed"] == []
    for path in (tmp_path / TAG).glob("relora_*"):
        shutil.copy(path, tmp_path / f"{TAG}_universal")
    for result in ranks(world_size).run(load, loaded, precision, str(tmp_path)):
        assert (result["t"], result["restarts"], result["client_state"]) == (SAVED_AT, [4, 8], {"mine": 7})
        assert result["losses"] == pytest.approx(losses, rel=1e-4 if precision == "bf16" else 1e-6)


def test_a_lost_file_is_named(tmp_path):
    ranks(2).run(save, 1, "bf16", str(tmp_path))
    ranks(1).run(convert, str(tmp_path))
    for path in (tmp_path / TAG).glob("relora_*"):
        shutil.copy(path, tmp_path / f"{TAG}_universal")
    moment = tmp_path / f"{TAG}_universal" / "zero" / "lm_head.weight" / "exp_avg.pt"
    moment.rename(tmp_path / "elsewhere")
    for result in ranks(2).run(load, 1, "bf16", str(tmp_path)):
        assert f"{moment} is missing" in result["refused"] and result["changed"] == []
    (tmp_path / "elsewhere").rename(moment)
    (tmp_path / f"{TAG}_universal" / "relora_frozen_masters_00001.safetensors").unlink()
    for result in ranks(2).run(load, 1, "bf16", str(tmp_path)):
        assert "relora_frozen_masters_*.safetensors file was lost" in result["refused"] and result["changed"] == []
