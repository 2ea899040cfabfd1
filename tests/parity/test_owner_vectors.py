"""Owners' updates in the engine, in fp32, against numbers of the rules in fp64, on each ZeRO stage."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import relora_ds
from relora_ds.config import ReLoRAConfig
from relora_ds.matrix import apollo_update, spectral
from relora_ds.matrix.adam import ProjectedAdam
from relora_ds.matrix.apollo_update import Apollo
from relora_ds.matrix.fira_update import Fira
from relora_ds.matrix.scale_update import Scale
from relora_ds.matrix.sst_update import SST
from tests.parity.cases import release
from tests.parity.given import engine_of
from tests.ranks import ranks
from tests.vectors import vectors

FIRA = {case["name"]: case for case in vectors("matrix/fira")["cases"]}
APOLLO = {case["name"]: case for case in vectors("matrix/apollo")["cases"]}
SCALE, LSQ, SPECTRAL = vectors("matrix/scale"), vectors("matrix/apollo_lsq"), vectors("sst/vectors")
KINDS = {"hidden": "W_hidden", "head": "W_last_layer_momentum_09", "embedding": "W_embedding"}


class Linear(nn.Module):
    """A linear, and a bias for DeepSpeed's optimizer."""

    def __init__(self, weight):
        super().__init__()
        self.linear = nn.Linear(*reversed(weight.shape))
        self.linear.weight.data.copy_(weight)
        self.linear.bias.data.zero_()

    def forward(self, x, y, kind):
        product = self.linear(x) - self.linear.bias + 0 * self.linear.bias
        return (product * y).sum() if kind == "given" else (product - y).pow(2).sum() / (2 * len(x))


def trained(rule, weight, steps, *, stage, accumulation, lr, weight_decay=0.0, projections=(), sampled=None):
    """W after each step. steps: `(kind, x, y)` each, with the rows of all micro-batches of all ranks."""
    model = relora_ds.wrap(Linear(weight), ReLoRAConfig(trains="none", target_modules=["linear"]))
    engine = engine_of(
        model, stage=stage, accumulation=accumulation, lr=lr, weight_decay=weight_decay, matrix_optimizer=rule
    )
    weights, given = [], iter(projections)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(apollo_update, "random_projection", lambda shape, r, key: next(given).float())
        if sampled is not None:
            patch.setattr(spectral, "sample", lambda *given: sampled)
        for kind, x, y in steps:
            rows = [part.chunk(dist.get_world_size())[dist.get_rank()].float() for part in (x, y)]
            for micro_x, micro_y in zip(*(part.chunk(accumulation) for part in rows), strict=True):
                engine.backward(engine(micro_x, micro_y, kind))
                engine.step()
            merged = engine.collect_merged()
            found = [None if merged is None else merged["linear.weight"].cpu()]
            dist.broadcast_object_list(found)
            weights.append(found[0])
    release(engine)
    return torch.stack(weights)


def given(gradient, accumulation):
    """A step whose gradient this is: micro-batches have different ones, of which it is the mean."""
    parts = 2 * accumulation
    parts_of = [gradient * (1 + (-1) ** part * 0.5) for part in range(parts)]
    x = torch.eye(gradient.shape[1], dtype=gradient.dtype).repeat(parts, 1)
    return "given", x, torch.cat([part.T for part in parts_of])


def check(rule, weight, steps, expected, **how):
    results = ranks(2).run(trained, rule, weight, steps, **how)
    assert torch.equal(*results)
    torch.testing.assert_close(results[0].double(), expected, rtol=1e-5, atol=1e-5)


def of_case(rule, case, expected, stage, accumulation, **how):
    steps = [given(gradient, accumulation) for gradient in case["G"]]
    check(rule, case["W0"], steps, expected, stage=stage, accumulation=accumulation, lr=case["lr"], **how)


@pytest.mark.each_value_once
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", FIRA)
def test_fira(name, stage, accumulation):
    case = FIRA[name]
    how = dict(alpha=case["alpha"], update_proj_gap=case["T"], variant=case["variant"])
    rule = Fira(case["r"], ProjectedAdam(eps=case["eps"]), **how)
    of_case(rule, case, case["W"], stage, accumulation, weight_decay=case["weight_decay"])


@pytest.mark.each_value_once
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("name", APOLLO)
def test_apollo(name, stage, accumulation):
    case = APOLLO[name]
    options = {key: case[key] for key in ("scale_type", "scale", "scale_front")}
    adam = ProjectedAdam(eps=case["eps"])
    rule = Apollo(case["r"], update_proj_gap=case["T"], limits=case["limiter"], adam=adam, **options)
    projections = case["P"].mT if case["m"] < case["n"] else case["P"]
    of_case(rule, case, case["W"], stage, accumulation, projections=projections)


@pytest.mark.each_value_once
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_apollo_where_every_rank_has_rows_of_a_least_squares_problem(stage, accumulation):
    rule = Apollo(LSQ["r"], limits=False)
    steps = [("least squares", LSQ["X"], LSQ["Y"])] * len(LSQ["W"])
    how = dict(stage=stage, accumulation=accumulation, lr=LSQ["lr"], projections=[LSQ["P"]])
    check(rule, LSQ["W0"], steps, LSQ["W"], **how)


@pytest.mark.each_value_once
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_scale(kind, stage, accumulation):
    of_case(Scale(kind), SCALE, SCALE[KINDS[kind]], stage, accumulation)


@pytest.mark.each_value_once
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_sst(stage, accumulation):
    """Two vectors of each side, and all values."""
    rule, steps = SST(2, iteration_warmup_steps=0), [given(SPECTRAL["G"], accumulation)]
    how = dict(stage=stage, accumulation=accumulation, lr=SPECTRAL["lr"], sampled=torch.tensor([0, 2]))
    check(rule, SPECTRAL["W0"], steps, SPECTRAL["W_after"][None], **how)
