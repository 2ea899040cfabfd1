"""Checkpoints in DeepSpeed's format, which relora_ds 0.1 wrote for loops of one's own, are refused with what to do."""

import json
from argparse import Namespace
from pathlib import Path

import pytest

from relora_ds.checkpoint.earlier import refusal
from relora_ds.commands import checkpoint
from relora_ds.interop.hf_export import export
from relora_ds.interop.sources import locate
from tests.parity import cases
from tests.ranks import ranks


def deepspeeds(tag: Path) -> None:
    tag.mkdir(parents=True)
    (tag / "mp_rank_00_model_states.pt").write_bytes(b"PK")
    (tag / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"PK")


def of_version_0_1(tag: Path) -> None:
    deepspeeds(tag)
    (tag / "relora_model.json").write_text(json.dumps({"stage": 1, "bf16": True, "world_size": 1}))
    (tag / "relora_frozen_masters_00000.safetensors").write_bytes(b"")
    (tag / "config.json").write_text("{}")


def universal(tag: Path) -> None:
    parameter = tag / "zero" / "lm_head.weight"
    parameter.mkdir(parents=True)
    for name in ("fp32.pt", "exp_avg.pt", "exp_avg_sq.pt"):
        (parameter / name).write_bytes(b"PK")
    (tag / "mp_rank_00_model_states.pt").write_bytes(b"PK")
    (tag / "relora_model.json").write_text("{}")


FORMATS = {
    of_version_0_1: "engine.save_checkpoint of relora_ds 0.1 wrote, which is not read any more; end that training with",
    universal: "is a universal checkpoint of DeepSpeed, which is not read; with relora_ds 0.1, export the weights",
    deepspeeds: "is DeepSpeed's own checkpoint, which has no fp32 masters of frozen weights and is not read",
}


def load(directory: str, *tags: str | None) -> list[str]:
    """On a rank: what an engine says of each tag."""
    engine, said = cases.build(1), []
    for tag in tags:
        with pytest.raises(ValueError) as error:
            engine.load_checkpoint(directory, tag)
        said.append(str(error.value))
    cases.release(engine)
    return said


@pytest.mark.parametrize("write", FORMATS)
def test_they_are_refused_with_what_to_do(tmp_path, write):
    write(tmp_path / "global_step9")
    (tmp_path / "latest").write_text("global_step9")
    for directory in (tmp_path, tmp_path / "global_step9"):
        assert FORMATS[write] in refusal(directory)
    for answers in ranks(2).run(load, str(tmp_path), None, "global_step9"):
        assert all(said.startswith("load_checkpoint: ") and FORMATS[write] in said for said in answers)
    for action in (
        lambda: export(tmp_path, tmp_path / "out"),
        lambda: locate(str(tmp_path)),
        lambda: locate(str(tmp_path / "global_step9")),
        lambda: checkpoint.run(Namespace(action="list", run=tmp_path)),
    ):
        with pytest.raises(ValueError, match="not read"):
            action()


def test_ours_beside_them_is_read(tmp_path):
    of_version_0_1(tmp_path / "global_step9")
    assert ranks(2).run(save_and_load, str(tmp_path)) == [str(tmp_path / "new")] * 2


def save_and_load(directory: str) -> str:
    engine = cases.build(1)
    engine.save_checkpoint(directory, "new")
    path, _ = engine.load_checkpoint(directory)
    cases.release(engine)
    return path
