"""Exchanges against numbers that do not come from here (tests/fixtures/islands), to 1e-6 in fp32."""

import json
from pathlib import Path

import pytest
import torch

from tests.exchange import vector_cases
from tests.exchange.cases import at_once, worlds
from tests.islands.servers import serving

FILE = json.loads((Path(__file__).parents[1] / "fixtures" / "islands" / "lsq.json").read_text())
W0, X, Y = (torch.tensor(FILE[name]) for name in ("W0", "X", "Y"))
HALVES = (slice(0, 4), slice(4, 8))
NESTEROV = {"outer_optimizer": "nesterov", "outer_lr": 0.7, "outer_momentum": 0.9}
AVERAGE = {"outer_optimizer": "average"}


def run_both(tmp_path, sizes, call) -> list[list]:
    """Call `call(island, address)`, a case and its arguments, on both islands."""

    def run(island, world, address):
        (case, *arguments), how = call(island)
        return world.run(case, island, address, *arguments, **how)

    with serving(tmp_path) as server, worlds(*sizes) as found:
        return at_once(*(lambda i=i, w=w: run(i, w, server.address) for i, w in enumerate(found)))


def close(found, expected) -> bool:
    return bool(((found.double() - torch.tensor(expected).double()).abs() <= 1e-6).all())


@pytest.mark.parametrize(
    ("name", "inner", "every", "outer"),
    [
        ("diloco_adamw", "adam", 3, NESTEROV),
        pytest.param("diloco_sgd", "sgd", 3, NESTEROV, marks=pytest.mark.slow),
        pytest.param("H1_sgd", "sgd", 1, AVERAGE, marks=pytest.mark.slow),
        pytest.param("H1_adam", "adam", 1, AVERAGE, marks=pytest.mark.slow),
    ],
)
def test_islands_on_halves_of_the_data(name, inner, every, outer, tmp_path):
    expected = FILE[name]["W"]
    how = {"every": every, "rounds": len(expected), "inner": inner, **outer}

    def call(island):
        case = (vector_cases.train, W0, X[HALVES[island]], Y[HALVES[island]])
        return case, {"stage": (1, 3)[island], **how}

    for island in run_both(tmp_path, (1, 2), call):
        for weights in island:
            for found, value in zip(weights, expected, strict=True):
                assert close(found, value)
    if "ddp" in FILE[name]:  # an exchange after each step: that of SGD is data parallelism, that of Adam is not
        assert close(island[0][-1], FILE[name]["ddp"][-1]) == (inner == "sgd")


def test_what_4_bits_leave_out_arrives_later(tmp_path):
    """Beside an update of 7, one of 0.4 is below half a step, and would never arrive."""
    update, rounds = torch.tensor([[7.0, 0.4, -0.4, 0.1]]), 10
    with serving(tmp_path) as server, worlds(1) as (world,):
        how = {"count": 1, "compress": "int4", **AVERAGE}
        found = world.run(vector_cases.drift, 0, server.address, update, rounds, **how)[0]
    assert ((found - rounds * update).abs() <= 0.5 + 1e-5).all()


@pytest.mark.parametrize(
    ("expected", "one_sided"),
    [("mean_of_products", False), pytest.param("shared_A_mean_of_products", True, marks=pytest.mark.slow)],
)
def test_products_are_averaged(expected, one_sided, tmp_path):
    given = FILE["average"]

    def call(island):
        A, B = torch.tensor(given["A"][0 if one_sided else island]), torch.tensor(given["B"][island])
        return (vector_cases.merge, torch.zeros_like(W0), A, B), {"stage": (0, 2)[island], "one_sided": one_sided}

    for island in run_both(tmp_path, (1, 2), call):
        for merged in island:
            assert close(merged, given[expected])
            assert not close(merged, given["product_of_means"])
