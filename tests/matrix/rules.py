"""What the tests of update rules share: a loop of steps, and one rule a kind."""

import torch

from relora_ds.matrix.apollo_update import Apollo
from relora_ds.matrix.fira_update import Fira
from relora_ds.matrix.muon_update import Muon
from relora_ds.matrix.scale_update import Scale

RULES = {
    "fira": lambda: Fira(2, update_proj_gap=3),
    "fira paper": lambda: Fira(2, update_proj_gap=3, variant="paper"),
    "apollo": lambda: Apollo(2, update_proj_gap=3),
    "apollo mini": lambda: Apollo(1, scale_type="tensor", scale=128.0, update_proj_gap=3),
    "scale": lambda: Scale(),
    "scale of the head": lambda: Scale("head"),
    "scale of the embedding": lambda: Scale("embedding"),
    "muon": lambda: Muon(),
}
SHAPES = [(6, 4), (4, 6), (5, 5)]


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def same(ours, theirs, tolerance=1e-9):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def trajectory(rule, weight, gradients, lr=0.01, weight_decay=0.0, key="a weight", state=None):
    """W after every step. state: of the rule; it is changed."""
    if state is None:
        state = rule.begin(weight.shape, dtype=weight.dtype)
    weights, keeps = [], 1 - lr * weight_decay
    for gradient in gradients:
        if rule.decays_first:
            weight = keeps * weight + rule.update(gradient, state, lr, key)
        else:
            weight = keeps * (weight + rule.update(gradient, state, lr, key))
        weights.append(weight)
    return torch.stack(weights)


def updates(rule, gradients, key="a weight", lr=1.0):
    """What is added to W by each of the gradients `[steps, ..., out, in]`."""
    state = rule.begin(gradients.shape[1:], dtype=gradients.dtype)
    return torch.stack([rule.update(gradient, state, lr, key) for gradient in gradients])
