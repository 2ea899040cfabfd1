"""compile: engines and recipes that read whole gradients; layers are in tests/lowrank/test_gradient_sum.py."""

import functools

import pytest
import torch
from torch._dynamo.utils import counters

from relora_ds.models import compilation
from relora_ds.zero.subspaces import takes_gradients_along
from tests.parity import cases, owner, sst
from tests.ranks import ranks
from tests.training.runs import losses
from tests.training.test_compile import RECIPE, train_recipe


def train_whole_gradients(stage: int, method: str, compiled: bool, family: str = "llama", **how) -> dict:
    """Eight steps, with two residual updates and a restart by the gradient where the method has them."""
    torch._dynamo.reset()
    counters.clear()
    if method == "residual":
        chain = dict(residual_every=3, restart_every=6, restart_warmup_steps=2)
        if family == "llama":
            chain |= dict(restart_init="gradient", gradient_estimate="exact")
        engine = cases.build(stage, relora=cases.one_sided_config(family, **chain), family=family, **how)
    elif method == "sst":
        engine = sst.build(stage, **how)
    else:
        engine = owner.build(stage, method, family, **how)
    engine.module.set_attn_implementation("sdpa")
    if compiled:
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(
                torch, "compile", functools.partial(torch.compile, backend="aot_eager_decomp_partition")
            )
            compilation.apply(engine.module, unless=lambda: takes_gradients_along(engine))
    found = {"losses": [cases.train_step(engine, step) for step in range(8)]}
    found |= {"weights": engine.collect_merged(), "graphs": counters["stats"]["unique_graphs"]}
    found |= {"breaks": dict(counters["graph_break"]), "restarts": engine.restarts}
    cases.release(engine)
    return found


@pytest.mark.parametrize(
    "world_size, stage, method, how",
    [
        (1, 1, "residual", {}),
        *(
            pytest.param(2, *case, marks=pytest.mark.slow)
            for case in (
                (0, "residual", {"accumulation": 2}),
                (1, "residual", {"family": "mixtral"}),
                (1, "muon", {"family": "mixtral"}),
                (2, "muon", {"accumulation": 2}),
                *((1, method, {}) for method in ("fira", "apollo", "apollo_mini", "scale, all matrices", "sst")),
            )
        ),
    ],
)
def test_whole_gradients_of_a_compiled_step(world_size, stage, method, how):
    """One graph: the step before a restart, in which layers take their gradients along, is not compiled."""
    plain, found = (
        ranks(world_size).run(train_whole_gradients, stage, method, compiled, **how)[0] for compiled in (False, True)
    )
    assert found["graphs"] == 1 and not found["breaks"]
    assert found["restarts"] == plain["restarts"] == ([6] if method == "residual" else [])
    assert found["losses"] == pytest.approx(plain["losses"], rel=1e-6)
    for name, weight in plain["weights"].items():
        assert (found["weights"][name] - weight).norm() <= 1e-5 * weight.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("method", ["galore", "muon"])
def test_a_recipe_of_whole_gradients_that_is_compiled(method, tmp_path):
    """Generated code adds the gradients up as well."""
    chain = ["relora.trains=B", "relora.residual_every=2", "relora.restart_init=gradient"]
    overrides = [*RECIPE, f"method={method}", "warm_start_steps=0", *(chain if method == "galore" else [])]
    plain, compiled = (
        ranks(1).run(train_recipe, [f"run_dir={tmp_path / name}", *overrides, f"compile={name}"], timeout=600)[0]
        for name in ("false", "true")
    )
    assert (plain[0], compiled[0]) == (0, 1)
    assert compiled[1] == pytest.approx(plain[1], rel=1e-4)
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), rel=1e-4)
