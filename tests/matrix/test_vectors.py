"""The update rules against numbers that do not come from here, in fp64."""

import pytest
import torch

from relora_ds.matrix import apollo_update
from relora_ds.matrix.adam import ProjectedAdam
from relora_ds.matrix.apollo_update import Apollo
from relora_ds.matrix.fira_update import Fira
from relora_ds.matrix.scale_update import Scale
from tests.matrix.rules import same, trajectory
from tests.vectors import vectors

FIRA = {case["name"]: case for case in vectors("matrix/fira")["cases"]}
APOLLO = {case["name"]: case for case in vectors("matrix/apollo")["cases"]}


@pytest.mark.parametrize("name", FIRA)
def test_fira(name):
    case = FIRA[name]
    rule = Fira(
        case["r"],
        ProjectedAdam(eps=case["eps"]),
        alpha=case["alpha"],
        update_proj_gap=case["T"],
        variant=case["variant"],
    )
    state = rule.begin(case["W0"].shape, dtype=torch.float64)
    weight, norms = case["W0"], []
    for gradient, expected in zip(case["G"], case["W"], strict=True):
        weight = trajectory(rule, weight, [gradient], case["lr"], case["weight_decay"], state=state)[-1]
        norms.append(state["norm"].item())
        same(weight, expected)
    same(torch.tensor(norms, dtype=torch.float64), case["limited_norm"])


@pytest.mark.parametrize("name", APOLLO)
def test_apollo(name, monkeypatch):
    case = APOLLO[name]
    is_left = case["m"] < case["n"]
    given = iter(case["P"].mT if is_left else case["P"])
    monkeypatch.setattr(apollo_update, "random_projection", lambda shape, r, key: next(given))
    options = {key: case[key] for key in ("scale_type", "scale", "scale_front")}
    adam = ProjectedAdam(eps=case["eps"])
    rule = Apollo(case["r"], update_proj_gap=case["T"], limits=case["limiter"], adam=adam, **options)
    same(trajectory(rule, case["W0"], case["G"], case["lr"]), case["W"])
    assert next(given, None) is None, "a projection was not used"


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("hidden", "W_hidden"), ("head", "W_last_layer_momentum_09"), ("embedding", "W_embedding")],
)
def test_scale(kind, expected):
    case = vectors("matrix/scale")
    same(trajectory(Scale(kind), case["W0"], case["G"], case["lr"]), case[expected])
