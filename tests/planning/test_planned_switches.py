"""What switches cost, against what they do."""

import pytest

from relora_ds.config import SwitchLoRAConfig, load_recipe, method_of
from relora_ds.lowrank import switching
from relora_ds.planning.device_memory import DEVICE, HOST, KEPT, total
from relora_ds.planning.network import network_of, shapes_of
from relora_ds.planning.planned_switches import switch_bytes, switch_items

STEPS, R = 300, 8


@pytest.fixture(scope="module")
def shapes():
    recipe = load_recipe("tiny", ["method=switchlora", "warm_start_steps=0", f"relora.r={R}"])
    config, _ = network_of(recipe)
    return shapes_of(method_of(recipe), config)


@pytest.mark.parametrize("stage", [0, 1])
def test_bytes_are_those_of_the_switches_of_a_run(stage, shapes):
    config, numbers = SwitchLoRAConfig(interval=10, ratio=0.5), 0
    for name, (out, inner) in shapes.merged.items():
        for t in range(STEPS):
            every = switching.interval(t, STEPS, first=config.interval, ratio=config.ratio)
            turn = switching.turn_of(R, min(out, inner), (0, 0), R / every, f"{name}/{t}")
            numbers += len(turn.new_rows) * inner + len(turn.new_columns) * out
            numbers += len(turn.pairs) * (out + inner) if stage else 0
    payload, wire = switch_bytes(shapes, R, config, total_steps=STEPS, stage=stage, world_size=4)
    assert payload == pytest.approx(4 * numbers / STEPS, rel=0.05) and wire == pytest.approx(1.5 * payload)


def test_memory_is_that_of_candidates_and_numbers(shapes):
    candidates = sum(4 * (out + inner) * min(out, inner) for out, inner in shapes.merged.values())
    items = switch_items(shapes, stage=1, world_size=1)
    assert total(items, HOST, KEPT) == candidates
    assert total(items, DEVICE, KEPT) == 4 * sum(R * (out + inner) for out, inner in shapes.merged.values())
    halves = switch_items(shapes, stage=1, world_size=2)
    assert candidates / 2 <= total(halves, HOST, KEPT) < candidates
