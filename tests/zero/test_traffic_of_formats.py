"""Every byte of a step and of a restart, with frozen weights in each format (see `test_traffic`)."""

import math

import pytest

from relora_ds.zero.traffic import count_traffic, expected_step
from tests.parity import cases
from tests.ranks import ranks
from tests.zero.test_traffic import CONTROL, LAYERS, VOCAB, WORLD, R, check, pad

# Sizes that nf4 can store: 64 divides every weight.
EVEN_HIDDEN, EVEN_INTERMEDIATE = 48, 80
EVEN = {"hidden_size": EVEN_HIDDEN, "intermediate_size": EVEN_INTERMEDIATE}
EVEN_LINEARS = (
    [(EVEN_HIDDEN, EVEN_HIDDEN)] * 4 + [(EVEN_INTERMEDIATE, EVEN_HIDDEN)] * 2 + [(EVEN_HIDDEN, EVEN_INTERMEDIATE)]
)
EVEN_FACTORS = [size for out, fan_in in EVEN_LINEARS * LAYERS for size in (R * fan_in, out * R)]
EVEN_OTHERS = [VOCAB * EVEN_HIDDEN] * 2 + [EVEN_HIDDEN] * (2 * LAYERS + 1)


def stored(format: str, out: int, fan_in: int) -> int:
    """Bytes of a packed weight; its parts begin at multiples of 16."""
    weights, blocks = out * fan_in, out * fan_in // 64
    parts = {
        "bf16": [2 * weights],
        "int8": [weights, 4 * out],
        "fp8": [weights, 4 * out],
        "nf4": [weights // 2, 4 * blocks],
        "nf4_double": [weights // 2, blocks, 4 * math.ceil(blocks / 256), 4],
    }
    return sum(pad(part, 16) for part in parts[format])


def storage(format: str) -> dict:
    """The options of a format; fp32 is that of the run."""
    return {"frozen_dtype": format.removesuffix("_double"), "frozen_double_quant": format.endswith("_double")}


def of_frozen(variants: list[tuple[int, str, dict, int]]) -> list[tuple[list, list]]:
    """The calls of the third step and of a restart, for each `(stage, format, options, persistence threshold)`."""
    found = []
    for stage, format, options, threshold in variants:
        zero = {"stage3_param_persistence_threshold": threshold} if stage == 3 else None
        engine = cases.build(
            stage,
            zero=zero,
            accumulation=2,
            **EVEN,
            relora=cases.relora_config(r=R, lora_alpha=6, **storage(format), **options),
        )
        for step in range(2):
            cases.train_step(engine, step)
        with count_traffic() as a_step:
            cases.train_step(engine, 2)
        with count_traffic() as a_restart:
            engine.restart()
        cases.release(engine)
        found.append((a_step.calls, a_restart.calls))
    return found


@pytest.mark.parametrize(
    "format",
    [
        "fp32",
        "bf16",
        "int8",
        pytest.param("fp8", marks=pytest.mark.slow),
        pytest.param("nf4", marks=pytest.mark.slow),
        "nf4_double",
    ],
)
def test_stage_3_gathers_frozen_weights_as_they_are_stored(format):
    """Packed ones as bytes, also where it decides what is small; replicated ones never."""
    # 48x48 weights in nf4, and at 2,400 in fp32 too (elements), are below the threshold; in int8 and bf16 they are not.
    variants = [
        (3, format, {"frozen_placement": "sharded", "frozen_master": "none"}, 2400),
        (3, format, {"frozen_placement": "replicated", "frozen_master": "none"}, 1400),
    ]
    variants += [(3, format, {"frozen_placement": "sharded", "frozen_master": "cpu"}, 0)] * (format == "int8")
    results, other = ranks(WORLD).run(of_frozen, variants)
    assert results == other, "the ranks do not make the same calls"
    trainable = [(size, 4) for size in EVEN_FACTORS + EVEN_OTHERS]
    weights = [
        (out * fan_in, 4) if format == "fp32" else (stored(format, out, fan_in), 1)
        for out, fan_in in EVEN_LINEARS * LAYERS
    ]
    frozen_bytes = sum(numel * size for numel, size in weights)
    for (_, _, options, threshold), (a_step, a_restart) in zip(variants, results, strict=True):
        sharded = options["frozen_placement"] == "sharded"
        gathered = trainable + weights * sharded
        check(
            a_step,
            {
                "all_gather": sum(
                    pad(numel, WORLD) * size * (1 if numel <= threshold else 2) for numel, size in gathered
                ),
                "reduce_scatter": sum(pad(numel, WORLD) * size * 2 for numel, size in trainable),
            },
        )
        small = sum(numel * size for numel, size in gathered if numel <= threshold)
        expected, _ = expected_step(
            3,
            trainable=sum(numel for numel, _ in trainable),
            element_size=4,
            accumulation=2,
            frozen_bytes=frozen_bytes * sharded,
            small_bytes=small,
            world_size=WORLD,
        )
        assert 0 <= sum(size for _, size in a_step if size >= CONTROL) - expected <= 2 * 4 * len(gathered)
        assert sum(size for name, size in a_restart if name == "broadcast" and size >= 1024) == frozen_bytes
        exact = format == "fp32"
        again = sum(size for name, size in a_restart if name == "all_gather")
        assert again == (2 * frozen_bytes if sharded and (exact or options["frozen_master"] == "none") else 0)


def test_below_stage_3_a_format_changes_the_restart_only():
    variants = [(stage, format, {}, 0) for stage in (0, 1) for format in ("fp32", "int8", "nf4")]
    results, _ = ranks(WORLD).run(of_frozen, variants)
    for (stage, format, _, _), (a_step, a_restart) in zip(variants, results, strict=True):
        assert a_step == results[3 * stage][0]
        broadcast = sum(size for name, size in a_restart if name == "broadcast" and size >= 1024)
        assert broadcast == sum(
            4 * out * fan_in if format == "fp32" else stored(format, out, fan_in)
            for out, fan_in in EVEN_LINEARS * LAYERS
        )
