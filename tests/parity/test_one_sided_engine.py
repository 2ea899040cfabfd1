"""One-sided chains in the engine, in fp32, against numbers of GaLore in fp64, on each ZeRO stage."""

import functools

import pytest
import torch

from tests.parity import one_sided_cases
from tests.parity.one_sided import Chain, GaLore
from tests.parity.test_one_sided_vectors import lsq_gradient
from tests.ranks import ranks
from tests.vectors import vectors


@functools.cache
def case() -> dict:
    return vectors("galore/lsq")


def settings(scaling: float = 1.0) -> dict:
    """C's learning rate and ε, with which the chain makes GaLore's updates of W."""
    return dict(lr=case()["alpha"] * case()["lr"] / scaling, eps=scaling * case()["eps"])


@functools.cache
def bases() -> list[torch.Tensor]:
    """The basis of each cycle in `lsq.json`, from the gradient of the cycle's first step."""
    optimizer = GaLore(case()["W0"], r=2, T=3, lr=0.05, alpha=0.25, eps=case()["eps"], style="hf")
    for weight in [case()["W0"], *case()["W"][:-1]]:
        optimizer.step(lsq_gradient(weight, case()["X"], case()["Y"]))
    return list(optimizer.bases.values())


@functools.cache
def one_step_behind(moments: str, weight_decay: float = 0.0) -> torch.Tensor:
    """W after every step of a chain whose next basis comes from the gradient of the step before, as in an engine."""
    chain = Chain(case()["W0"], bases()[0], scaling=1.0, moments=moments, weight_decay=weight_decay, **settings())
    weights = []
    for count in range(1, len(case()["W"]) + 1):
        gradient = lsq_gradient(chain.weight, case()["X"], case()["Y"])
        chain.step(chain.gradient(gradient))
        if count % case()["T"] == 0 and count < len(case()["W"]):
            Q = torch.linalg.svd(gradient).Vh[:2]
            chain.refresh(Q * Q.gather(1, Q.abs().argmax(1, keepdim=True)).sign())
        weights.append(chain.weight)
    return torch.stack(weights)


def run(num_ranks, stage, **how):
    results = ranks(num_ranks).run(one_sided_cases.least_squares, case(), stage=stage, Q=bases()[0], **how)
    assert all(result["restarts"] == [3, 6] for result in results)
    assert all(torch.equal(result["weights"], results[0]["weights"]) for result in results)
    return results[0]["weights"].double()


def close(ours, theirs, tolerance=1e-5):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_vectors_of_galore(stage, accumulation):
    """With their bases, which come from the gradient of a cycle's first step."""
    scaling = 4.0 if accumulation == 4 else 1.0
    how = dict(accumulation=accumulation, bases=bases(), scaling=scaling, **settings(scaling))
    close(run(2, stage, **how), case()["W"])


@pytest.mark.parametrize(("stage", "moments"), [(0, "rotate"), (1, "none"), (2, "zero"), (3, "rotate")])
def test_the_engines_own_bases(stage, moments):
    """Exact ones, signs and all; on two ranks, and on one."""
    how = dict(gradient_estimate="exact", optimizer_reset=moments, **settings())
    expected = one_step_behind({"none": "carry"}.get(moments, moments))
    close(run(2, stage, **how), expected, 1e-4)
    close(run(1, stage, **how), expected, 1e-4)


@pytest.mark.parametrize("stage", [1, 3])
def test_weight_decay_acts_on_the_whole_weight(stage):
    """Of AdamW, before each update; on B alone it would decay what the current cycle has learned."""
    expected = one_step_behind("carry", weight_decay=0.5)
    assert (expected - one_step_behind("carry")).abs().max() > 1e-2
    close(run(2, stage, gradient_estimate="exact", weight_decay=0.5, **settings()), expected, 1e-4)


@pytest.mark.parametrize("name", ["right", "square", "right_torch_adam"])
def test_given_gradients(name):
    given = next(given for given in vectors("galore/given_gradients")["cases"] if given["name"] == name)
    for result in ranks(2).run(one_sided_cases.given_gradients, given, stage=1):
        close(result.double(), given["W"])
