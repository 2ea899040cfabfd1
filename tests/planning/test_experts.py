"""Experts with low-rank updates, and GPT-2's Conv1D: counted as engines hold and send them."""

from pathlib import Path

import pytest
from transformers import GPT2Config, MixtralConfig

from relora_ds.lowrank.wrap import count_parameters
from relora_ds.zero.teardown import release
from tests.planning.engines import build, overrides, planned, sent_in_a_step
from tests.planning.test_device_memory import compare
from tests.planning.test_planned_traffic import sent
from tests.ranks import ranks

CONFIGS = {
    "experts": MixtralConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=512,
    ),
    "conv1d": GPT2Config(n_embd=256, n_layer=4, n_head=4, n_positions=512),
}


def changes(directory: Path, kind: str, stage: int, precision: str, method: str = "relora") -> list[str]:
    CONFIGS[kind].save_pretrained(directory)
    experts = ["relora.target_parameters=[experts.gate_up_proj,experts.down_proj]"] if kind == "experts" else []
    more = ["model.preset=null", f"model.name_or_path={directory}", "relora.frozen_dtype=int8", *experts]
    return overrides(stage, precision, method, 1, *more)


def counted(changes: list[str]) -> tuple[int, int]:
    """On a rank: what trains of an engine, and all of it."""
    engine = build(changes)
    found = count_parameters(engine.module)
    release(engine)
    return found


@pytest.mark.parametrize("kind", CONFIGS)
def test_parameters_are_those_of_the_engine(tmp_path, kind):
    recipe = changes(tmp_path, kind, 1, "fp32")
    shapes = planned(recipe).shapes
    [found, _] = ranks(2).run(counted, recipe)
    assert (shapes.num_trainable, shapes.num_trainable + shapes.num_frozen) == found
    if kind == "experts":
        assert sum(len(shape) == 3 for shape in shapes.merged.values()) == 6


@pytest.mark.parametrize(
    "kind, stage, precision",
    [
        ("experts", 3, "fp32"),
        pytest.param("experts", 1, "bf16", marks=pytest.mark.slow),
        pytest.param("conv1d", 3, "fp32", marks=pytest.mark.slow),
    ],
)
def test_bytes_are_those_of_the_engine(tmp_path, kind, stage, precision):
    recipe = changes(tmp_path, kind, stage, precision)
    expected = planned(recipe)
    for result in ranks(2).run(sent, recipe):
        assert result["step"] == pytest.approx(expected.step, rel=0.01)
        assert result["restart"] == pytest.approx(expected.restart, rel=0.01)
    compare(recipe)


@pytest.mark.parametrize(("stage", "method"), [(3, "muon"), pytest.param(1, "fira", marks=pytest.mark.slow)])
def test_experts_that_owners_update(tmp_path, stage, method):
    gate = "relora.trainable_modules=[embeddings,head,norms,gate]"
    recipe = [*changes(tmp_path, "experts", stage, "bf16", method), gate]
    expected = planned(recipe)
    for step in ranks(2).run(sent_in_a_step, recipe):
        assert step == pytest.approx(expected.step, rel=0.01)
    compare(recipe)
