"""The `A` that a restart begins with: from the gradient, or random."""

import pytest
import torch

from relora_ds.lowrank.linear import initial_A
from relora_ds.lowrank.reinit import ROW_NORM, random_basis
from relora_ds.lowrank.wrap import lowrank_layers
from relora_ds.zero.collect import gather_factors
from tests.parity import cases
from tests.ranks import ranks
from tests.zero.restarts import fingerprint


def restart_on_schedule(stage, accumulation=1, **relora) -> dict:
    """Train through the first scheduled restart; returns the new A's, and how much of the gradient each captures."""
    engine = cases.build(stage, relora=cases.relora_config(**relora), accumulation=accumulation)
    for step in range(cases.EVERY - 1):
        cases.train_step(engine, step)
        assert all(layer.sketch is None for layer in lowrank_layers(engine.module).values())
    gradients = full_gradients(engine.collect_merged(), cases.EVERY - 1)
    cases.train_step(engine, cases.EVERY - 1)
    assert engine.restarts == [cases.EVERY]
    layers, found, captured = lowrank_layers(engine.module), {}, []
    for name in layers:
        A = found[name] = gather_factors(engine.shards, engine.frozen, name, None)[0].cpu()
        basis = torch.linalg.qr(A.t()).Q
        best = torch.linalg.svd(gradients[name]).S[:4].square().sum()
        captured.append(((gradients[name] @ basis).square().sum() / best).item())
    cases.train_step(engine, cases.EVERY)
    lengths = {name: layer.row_norm**2 for name, layer in layers.items()}
    result = {
        "A": fingerprint(found),
        "captured": captured,
        "orthogonal": all(torch.allclose(A @ A.t(), torch.eye(4) * lengths[n], atol=1e-5) for n, A in found.items()),
        "values": {name: A.tolist() for name, A in found.items()},
    }
    cases.release(engine)
    return result


def full_gradients(weights, step) -> dict:
    """Of the merged weights, on the whole global batch, in one process."""
    model = cases.FAMILIES["llama"](0)
    model.load_state_dict(weights)
    tokens = cases.batch(step, cases.GLOBAL_BATCH)
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: module.weight.grad for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


@pytest.mark.each_value_once
@pytest.mark.parametrize(
    ("stage", "accumulation", "relora", "least"),
    [
        (0, 1, dict(restart_init="gradient"), 0.8),
        (1, 3, dict(restart_init="gradient"), 0.8),
        (3, 3, dict(restart_init="gradient"), 0.8),
        (2, 1, dict(restart_init="gradient", gradient_estimate="warm_sketch"), 0.8),
        (3, 1, dict(restart_init="gradient", gradient_estimate="warm_sketch", trains="B"), 0.8),
        (0, 3, dict(restart_init="gradient", gradient_estimate="exact"), 0.99999),
        (1, 3, dict(restart_init="gradient", gradient_estimate="exact", trains="B"), 0.99999),
        (3, 1, dict(restart_init="gradient", gradient_estimate="exact", trains="B"), 0.99999),
    ],
)
def test_a_begins_in_the_gradients_dominant_rows(stage, accumulation, relora, least):
    results = ranks(2).run(restart_on_schedule, stage, accumulation, **relora)
    assert results[0] == results[1] and results[0]["orthogonal"]
    assert sum(results[0]["captured"]) / len(results[0]["captured"]) > least


def test_kaimings_a_does_not_look_at_the_gradient():
    captured = ranks(2).run(restart_on_schedule, 1)[0]["captured"]
    assert sum(captured) / len(captured) < 0.5


@pytest.mark.parametrize(("stage", "trains"), [(1, "both"), (3, "B")])
def test_a_is_a_random_basis(stage, trains):
    results = ranks(2).run(restart_on_schedule, stage, restart_init="random", trains=trains)
    assert results[0] == results[1] and results[0]["orthogonal"]
    for name, A in results[0]["values"].items():
        expected = random_basis(torch.Size((4, len(A[0]))), f"0/1/{name}") * (1 if trains == "B" else ROW_NORM)
        torch.testing.assert_close(torch.tensor(A), expected)


def restart_by_hand_without_a_sketch() -> bool:
    engine = cases.build(1, relora=cases.relora_config(restart_init="gradient"))
    for step in range(3):
        cases.train_step(engine, step)
    engine.restart()
    masters = cases.gathered_state(engine)["master"]
    same = all(
        torch.equal(masters[f"{name}.lora_A"], initial_A(4, layer.in_features, seed=0, restart=1, name=name))
        for name, layer in lowrank_layers(engine.module).items()
    )
    cases.release(engine)
    return same


def test_a_restart_by_hand_has_no_gradient_to_choose_from():
    assert ranks(2).run(restart_by_hand_without_a_sketch) == [True, True]
