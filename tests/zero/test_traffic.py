"""Every byte of a step and of a restart, counted where it is sent, against what the parameters' shapes explain.

The expectation is written down from the model's sizes alone: which tensors train, how ZeRO groups and pads
them. Nothing is read from the engine, so a byte that DeepSpeed or we send without need makes a test fail.
"""

import functools
import math
from collections import Counter

import pytest

import relora_ds
from relora_ds.lowrank.reinit import OVERSAMPLED
from relora_ds.zero.traffic import count_traffic, expected_step
from tests.parity import cases
from tests.ranks import ranks
from tests.small_models import llama

# Odd factors of the low-rank pair, and a group that is no multiple of 4 elements: everything is padded somewhere.
HIDDEN, INTERMEDIATE, VOCAB, LAYERS, R = 44, 71, 67, 3, 3
SIZES = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE}
WORLD = 2
BYTES = {"fp32": 4, "bf16": 2}
NOTHING_STAYS = (("stage3_param_persistence_threshold", 0),)  # stage 3 keeps no small parameter whole
# Control messages are a few scalars: overflow flag, gradient norm, the test's own loss. The smallest tensor, a
# norm's weight, has 88 bytes in bf16, so anything from here on is payload and has to be explained exactly.
CONTROL = 64

LINEARS = [(HIDDEN, HIDDEN)] * 4 + [(INTERMEDIATE, HIDDEN)] * 2 + [(HIDDEN, INTERMEDIATE)]
FROZEN = [out * fan_in for out, fan_in in LINEARS * LAYERS]
FACTORS = [size for out, fan_in in LINEARS * LAYERS for size in (R * fan_in, out * R)]
EMBEDDINGS = [VOCAB * HIDDEN] * 2
NORMS = [HIDDEN] * (2 * LAYERS + 1)
BASES = [R * fan_in for _, fan_in in LINEARS * LAYERS]  # A, where B alone trains
COLUMNS = [out * R for out, _ in LINEARS * LAYERS]
LOW_RANK = [FACTORS, EMBEDDINGS, NORMS]  # one list of sizes for each parameter group
FULL_RANK = [FROZEN + EMBEDDINGS, NORMS]


def pad(size: int, multiple: int) -> int:
    return math.ceil(size / multiple) * multiple


def step_bytes(
    stage: int,
    groups: list[list[int]],
    frozen: list[int],
    element_size: int,
    accumulation: int,
    persistence: int = 0,
    gathers: int = 1,
) -> dict[str, int]:
    """Payload bytes by collective of one optimizer step."""
    trainable = [size for group in groups for size in group]
    if stage == 0:
        found = {"all_reduce": sum(trainable)}
    elif stage in (1, 2):
        # Gradients are reduced as they are; a group's flat partitions start at 4-byte boundaries in 16 bit,
        # so the flat group is padded to 2 elements a rank.
        found = {
            "all_reduce": sum(trainable) * (accumulation if stage == 2 else 1),
            "all_gather": sum(pad(sum(group), 2 * WORLD) for group in groups),
        }
    else:
        # Each parameter is cut into equal pieces. One below the persistence threshold stays whole, and is
        # gathered again after the update only.
        stays = [size for size in trainable + frozen if size < persistence]
        moves = [size for size in trainable + frozen if size >= persistence]
        found = {
            "all_gather": sum(pad(s, WORLD) for s in moves) * accumulation * gathers
            + sum(pad(s, WORLD) for s in stays),
            "reduce_scatter": sum(pad(s, WORLD) for s in trainable) * accumulation,
        }
    return {name: size * element_size for name, size in found.items()}


def build(stage, precision, accumulation=1, zero=(), full_rank=False, **relora):
    zero = dict(zero)
    if not full_rank:
        return cases.build(
            stage,
            precision=precision,
            accumulation=accumulation,
            zero=zero,
            relora=cases.relora_config(r=R, lora_alpha=6, **relora),
            **SIZES,
        )
    engine, *_ = relora_ds.initialize(
        model=llama(**SIZES),
        config=cases.ds_settings(stage, precision, **zero),
        lr=cases.LR,
        total_steps=cases.STEPS,
        precision=precision,
        gradient_accumulation_steps=accumulation,
        micro_batch_size=cases.GLOBAL_BATCH // (WORLD * accumulation),
    )
    return engine


def third_step(*args, **kwargs) -> tuple[list[tuple[str, int]], float]:
    """The third step's calls and wire bytes. At stage 3 the first ones record the order of use, and gather more."""
    engine = build(*args, **kwargs)
    for step in range(2):
        cases.train_step(engine, step)
    with count_traffic() as traffic:
        cases.train_step(engine, 2)
    cases.release(engine)
    return traffic.calls, traffic.wire


def check(calls: list[tuple[str, int]], expected: dict[str, int]) -> None:
    payload, control = Counter(), [call for call in calls if call[1] < CONTROL]
    for name, size in calls:
        payload[name] += size if size >= CONTROL else 0
    assert +payload == Counter(expected), f"not explained by the shapes; calls: {calls}"
    assert sum(size for _, size in control) < 1024, f"control messages: {control}"


@functools.cache
def counted(*args, **kwargs) -> tuple[list[tuple[str, int]], float]:
    result, other = ranks(WORLD).run(third_step, *args, **kwargs)
    assert result == other, "the ranks do not make the same calls"
    return result


@pytest.mark.each_value_once
@pytest.mark.parametrize("precision", BYTES)
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_moves_what_trains_and_nothing_else(stage, accumulation, precision):
    calls, _ = counted(stage, precision, accumulation, NOTHING_STAYS)
    check(calls, step_bytes(stage, LOW_RANK, FROZEN, BYTES[precision], accumulation))


@pytest.mark.each_value_once
@pytest.mark.parametrize(("accumulation", "precision"), [(1, "bf16"), (4, "fp32")])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_one_sided_step_moves_r_elements_for_each_output(stage, accumulation, precision):
    """Nothing of the bases but, at stage 3, what gathers them with the frozen weights."""
    assert sum(COLUMNS) == R * sum(out for out, _ in LINEARS * LAYERS)
    calls, _ = counted(
        stage, precision, accumulation, NOTHING_STAYS, trains="B", restart_init="random", optimizer_reset="none"
    )
    moves = [COLUMNS, EMBEDDINGS, NORMS]
    check(calls, step_bytes(stage, moves, FROZEN + BASES, BYTES[precision], accumulation))


@pytest.mark.parametrize("accumulation", [1, 4])
def test_stage_3_keeps_small_parameters_whole_and_gathers_them_once(accumulation):
    threshold = sum(map(sum, LOW_RANK)) // 100  # what "auto" resolves to: 102 elements, so the norms stay whole
    assert max(NORMS) < threshold < min(FACTORS)
    calls, _ = counted(3, "bf16", accumulation)
    check(calls, step_bytes(3, LOW_RANK, FROZEN, 2, accumulation, persistence=threshold))


def test_stage_3_gathers_twice_past_its_live_parameters():
    past = (("stage3_max_live_parameters", 0), ("stage3_max_reuse_distance", 0), ("stage3_prefetch_bucket_size", 0))
    calls, _ = counted(3, "bf16", 1, NOTHING_STAYS + past)
    check(calls, step_bytes(3, LOW_RANK, FROZEN, 2, 1, gathers=2))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_what_is_frozen_costs_nothing(stage):
    """The same model with its embeddings frozen too: their bytes are gone, to the last one."""
    calls, _ = counted(stage, "bf16", trainable_modules=("head", "norms"))
    check(calls, step_bytes(stage, [FACTORS, EMBEDDINGS[:1], NORMS], [], 2, 1))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_full_rank_step_moves_more(stage):
    full = step_bytes(stage, FULL_RANK, [], 2, 1)
    check(counted(stage, "bf16", 1, NOTHING_STAYS, full_rank=True)[0], full)
    low = step_bytes(stage, LOW_RANK, FROZEN, 2, 1)
    # At stage 3 the frozen weights are gathered as well, and only the gradients shrink.
    assert all(low[name] < full[name] for name in full if (stage, name) != (3, "all_gather"))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_expected_step_is_exact_but_for_padding(stage, accumulation):
    calls, wire = counted(stage, "bf16", accumulation, NOTHING_STAYS)
    payload = sum(size for _, size in calls if size >= CONTROL)
    trainable = sum(map(sum, LOW_RANK))
    expected, expected_wire = expected_step(
        stage,
        trainable=trainable,
        frozen_bytes=2 * sum(FROZEN),
        element_size=2,
        accumulation=accumulation,
        world_size=WORLD,
    )
    padded = {
        0: 0,
        1: 3 * len(LOW_RANK),
        2: 3 * len(LOW_RANK),
        3: accumulation * 2 * len(FACTORS + EMBEDDINGS + NORMS + FROZEN),
    }[stage]
    assert expected <= payload <= expected + 2 * padded
    assert expected_wire <= wire <= expected_wire + 2 * padded + 1024


def restart_calls(stage: int, precision: str) -> list[tuple[str, int]]:
    engine = build(stage, precision)
    for step in range(2):
        cases.train_step(engine, step)
    with count_traffic() as traffic:
        engine.restart()
    cases.release(engine)
    return traffic.calls


@pytest.mark.each_value_once
@pytest.mark.parametrize("precision", BYTES)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_restart_moves_each_factor_once_and_each_frozen_weight_once(stage, precision):
    calls, same = ranks(WORLD).run(restart_calls, stage, precision)
    assert calls == same, "the ranks do not make the same calls"
    large = Counter(call for call in calls if call[1] >= 1024)
    reduces = [size for name, size in large.elements() if name == "reduce"]
    others = Counter({call: n for call, n in large.items() if call[0] != "reduce"})

    expected = Counter(("broadcast", size * BYTES[precision]) for size in FROZEN)
    if stage > 0:  # at stage 0 every rank has whole masters and moments, and only the merged weights move
        # One reduce of each layer's fp32 masters to its owner. Three histograms (11, 10 and 10 bits) find the pruning
        # threshold of each factor, whatever its size.
        assert sum(reduces) == 4 * sum(FACTORS) and len(reduces) == len(FROZEN)
        expected += Counter(("all_reduce", 4 * len(FACTORS) * (1 << bits)) for bits in (11, 10, 10))
    else:
        assert not reduces
    if stage == 3 and precision == "fp32":  # no masters: the stored weights are exact, and split over the ranks
        # To see that the merged ones are finite, and to merge.
        expected += Counter(2 * [("all_gather", 4 * pad(size, WORLD)) for size in FROZEN])
    assert others == expected, calls

    # Checksums and ties: some integers for each factor and each frozen weight; six fp64 sums of each merge, and whether
    # it is finite.
    small = [call for call in calls if call[1] < 1024]
    assert sum(size for _, size in small) <= 64 * len(FACTORS + FROZEN) + 52 * len(FROZEN) + CONTROL, small


def step_and_restart(stage: int, precision: str, estimate: str) -> tuple[list, list]:
    """The calls of a step that a refresh follows, and of the refresh."""
    one_sided = dict(trains="B", restart_init="gradient", gradient_estimate=estimate, optimizer_reset="rotate")
    engine = build(stage, precision, restart_every=4, restart_warmup_steps=0, **one_sided)
    for step in range(3):
        cases.train_step(engine, step)
    engine.after_step = lambda engine: None
    with count_traffic() as a_step:
        cases.train_step(engine, 3)
    with count_traffic() as a_restart:
        engine.restart()
    cases.release(engine)
    return a_step.calls, a_restart.calls


@pytest.mark.parametrize(
    ("stage", "precision", "estimate"), [(1, "bf16", "sketch"), (3, "fp32", "warm_sketch"), (2, "bf16", "exact")]
)
def test_a_refresh_moves_a_sketch_or_the_gradient_once_and_each_basis_once(stage, precision, estimate):
    (a_step, a_restart), same = ranks(WORLD).run(step_and_restart, stage, precision, estimate)
    assert (a_step, a_restart) == same, "the ranks do not make the same calls"
    gradients = [("reduce", 4 * size) for size in FROZEN]
    sketches = [("reduce", 4 * (R + OVERSAMPLED) * fan_in) for _, fan_in in LINEARS * LAYERS]
    exact = estimate == "exact"
    assert Counter(call for call in a_step if call[0] == "reduce") == Counter(gradients * exact)
    # B and its two moments to the owner of each layer, which sends both moments back in the new basis.
    reduces = sketches * (not exact) + [("reduce", 4 * size) for size in COLUMNS] * 3
    broadcasts = [("broadcast", BYTES[precision] * size) for size in FROZEN + BASES]
    broadcasts += [("broadcast", 2 * 4 * size) for size in COLUMNS]
    assert Counter(call for call in a_restart if call[0] in ("reduce", "broadcast")) == Counter(reduces + broadcasts)


def step_and_update(stage: int, precision: str, accumulation: int) -> tuple[list, list, list]:
    """The calls of a step within a period, of one that ends it, and of a save within the next one."""
    one_sided = dict(trains="B", restart_init="random", optimizer_reset="none", restart_warmup_steps=0)
    engine = build(stage, precision, accumulation, NOTHING_STAYS, restart_every=12, residual_every=4, **one_sided)
    for step in range(2):
        cases.train_step(engine, step)
    with count_traffic() as a_step:
        cases.train_step(engine, 2)
    cases.train_step(engine, 3)
    for step in range(4, 7):
        cases.train_step(engine, step)
    with count_traffic() as with_update:
        cases.train_step(engine, 7)
    cases.train_step(engine, 8)
    with count_traffic() as a_save:
        engine.residual.hold()
    cases.release(engine)
    return a_step.calls, with_update.calls, a_save.calls


@pytest.mark.each_value_once
@pytest.mark.parametrize(("accumulation", "precision"), [(1, "bf16"), (4, "fp32")])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_residual_update_moves_each_gradient_and_each_frozen_weight_once(stage, accumulation, precision):
    calls, same = ranks(WORLD).run(step_and_update, stage, precision, accumulation)
    assert calls == same, "the ranks do not make the same calls"
    a_step, with_update, a_save = calls
    element, moves = BYTES[precision], [COLUMNS, EMBEDDINGS, NORMS]
    plain = step_bytes(stage, moves, FROZEN + BASES, element, accumulation)
    check(a_step, plain)
    expected = Counter(plain) + Counter(reduce=4 * sum(FROZEN), broadcast=element * sum(FROZEN))
    if stage == 3:  # the bases, and frozen weights that have no masters
        expected["all_gather"] += element * sum(pad(size, WORLD) for size in BASES + FROZEN * (precision == "fp32"))
    check(with_update, expected)
    check(a_save, {"reduce": 4 * sum(FROZEN)})
