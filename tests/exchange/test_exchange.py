"""What islands hold after an exchange: the mean of their updates, to the bit the same, at every ZeRO stage."""

import functools

import pytest
import torch

from relora_ds.exchange.compress import pack, unpack
from tests import small_models
from tests.exchange import cases
from tests.exchange.cases import EVERY, ROUNDS, at_once, worlds
from tests.islands.servers import serving

SLOW = pytest.mark.slow


def train(sizes: tuple[int, ...], tmp_path, *, each=({}, {}, {}), **how) -> list[list[dict]]:
    """Train an island of so many ranks for each of `sizes`; returns what each rank of each island has told."""
    with serving(tmp_path) as server, worlds(*sizes) as found:
        return at_once(
            *(
                functools.partial(world.run, cases.train, index, server.address, len(sizes), **{**how, **each[index]})
                for index, world in enumerate(found)
            )
        )


def check_equal(results: list[list[dict]]) -> None:
    first = results[0][0]
    assert len(first["weights"]) == ROUNDS + 1 and not any(first["missing"])
    for island in results[1:]:
        for mine, other in zip(first["weights"], island[0]["weights"], strict=True):
            for name, value in mine.items():
                assert torch.equal(value, other[name]), name


def expected_weights(
    results: list[list[dict]], round: int, weights: list[float], factors: str = "none"
) -> dict[str, torch.Tensor]:
    """Return what the plain mean of the islands' updates makes of the weights after `round` exchanges, in fp64.

    factors: how these were sent.
    """
    before = results[0][0]["weights"][round]
    found = {name: value.double() for name, value in before.items()}
    for part, island in zip(weights, results, strict=True):
        for rank in island:
            for layer, (lora_A, lora_B) in rank["sent"][round].items():
                found[f"{layer}.weight"] += part * (rank["rho"][round] - 1) * before[f"{layer}.weight"].double()
                lora_A, lora_B = (unpack(pack(one, factors), one.shape, factors).double() for one in (lora_A, lora_B))
                found[f"{layer}.weight"] += part * 2.0 * (lora_B @ lora_A)
            for name, value in rank["anchors"][round].items():
                found[name] += part * (value.double() - before[name].double())
    return found


@SLOW  # below are islands of all stages: weights in int8 at 1 and 0, three islands at 1, 3 and 2
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("method", ["galore", "relora", "full"])
def test_all_islands_hold_the_same_bits(method, stage, precision, tmp_path):
    check_equal(train((1, 2), tmp_path, method=method, stage=stage, precision=precision))


@pytest.mark.parametrize(
    ("stages", "frozen"),
    [
        ((1, 0), {"frozen_dtype": "int8", "frozen_master": "none"}),
        pytest.param((3, 1), {"frozen_dtype": "nf4"}, marks=SLOW),
    ],
)
def test_quantized_weights(stages, frozen, tmp_path):
    """What is rounded at a merge is rounded alike on all islands."""
    check_equal(train((1, 2), tmp_path, method="relora", frozen=frozen, each=[{"stage": one} for one in stages]))


@pytest.mark.parametrize("stages", [(1, 3, 2), pytest.param((2, 0, 3), marks=SLOW)])
def test_three_islands_of_other_sizes_and_stages(stages, tmp_path):
    each = [{"stage": stage} for stage in stages]
    results = train((1, 2, 3), tmp_path, each=each, outer_optimizer="average")
    check_equal(results)
    for round in range(ROUNDS):
        weights = [1 / 6, 2 / 6, 3 / 6]  # by sequences: each rank has as many
        for name, value in expected_weights(results, round, weights).items():
            assert (results[0][0]["weights"][round + 1][name] - value).norm() <= 1e-6 * value.norm(), (round, name)


@pytest.mark.parametrize(
    ("method", "stage", "precision"),
    [("random", 1, "bf16"), pytest.param("full", 3, "fp32", marks=SLOW), pytest.param("relora", 2, "fp32", marks=SLOW)],
)
def test_one_island_by_itself_is_none(method, stage, precision, tmp_path):
    """A mean of one with a learning rate of 1 changes no bit. ReLoRA's A is another one: it is the island's own."""
    how = {"method": method, "stage": stage, "precision": precision}
    with serving(tmp_path) as server, worlds(2) as (world,):
        plain = world.run(cases.train_alone, None, None, **how)[0]
        island = world.run(cases.train_alone, 1, server.address, outer_optimizer="average", **how)[0]
    same = plain if method != "relora" else plain[:EVERY]
    for (loss, weights), (its_loss, its_weights) in zip(same, island, strict=False):
        assert loss == its_loss
        assert all(torch.equal(value, its_weights[name]) for name, value in weights.items())


@pytest.mark.parametrize(
    ("method", "compress", "factors"),
    [
        ("galore", "int4", "none"),
        ("relora", "none", "int8"),
        pytest.param("galore", "none", "bf16", marks=SLOW),
        pytest.param("relora", "int4", "none", marks=SLOW),
        pytest.param("full", "none", "none", marks=SLOW),
        pytest.param("full", "int4", "none", marks=SLOW),
    ],
)
def test_bytes_are_those_of_the_formula(method, compress, factors, tmp_path):
    """r·(in + out) for each weight, r·out and a sketch where A is common, and all else: of 4 bytes, or of fewer."""
    results = train((1, 2), tmp_path, method=method, compress=compress, compress_factors=factors)
    for told in (results[0][0], results[1][0]):
        assert told["bytes"] == [expected_bytes(method, compress, factors, round) for round in range(ROUNDS)]


def expected_bytes(method: str, compress: str, of_factors: str, round: int) -> tuple[int, int]:
    """Return what an island sends, and receives of one other, by the shapes of the model."""
    linears, others = [], []
    for name, parameter in small_models.llama().named_parameters():
        is_low_rank = method != "full" and "layers" in name and parameter.ndim == 2
        (linears if is_low_rank else others).append(parameter.shape)
    r = 4
    numbers = [r * one for out, into in linears for one in ((out,) if method == "galore" else (out, into))]
    if of_factors == "int8":
        factors = sum(number + 2 * -(-number // 64) for number in numbers)
    else:
        factors = sum(numbers) * (2 if of_factors == "bf16" else 4)
    if method == "galore" and round < ROUNDS - 1:  # no cycle follows the last exchange
        factors += sum(4 * (r + 8) * into for _, into in linears)
    blocks = sum(-(-shape.numel() // 64) for shape in others)
    dense = 4 * sum(shape.numel() for shape in others)
    if compress == "int4":
        dense = 2 * blocks + sum(-(-shape.numel() // 2) for shape in others)
    return factors + dense, factors + dense


@pytest.mark.parametrize(
    ("method", "factors"),
    [
        ("relora", "int8"),
        # The vectors say the same.
        *(pytest.param(method, "none", marks=SLOW) for method in ("relora", "random", "galore", "full")),
        pytest.param("random", "bf16", marks=SLOW),
    ],
)
def test_the_mean_of_products_is_added(method, factors, tmp_path):
    """Of the factors as they were sent, also of an island's own."""
    how = {"outer_optimizer": "average", "compress_factors": factors}
    results = train((1, 1), tmp_path, method=method, **how, each=[{"size": 2}, {"size": 6}])
    check_equal(results)
    for round in range(ROUNDS):
        for name, value in expected_weights(results, round, [0.25, 0.75], factors).items():
            assert (results[0][0]["weights"][round + 1][name] - value).norm() <= 1e-6 * value.norm(), (round, name)
