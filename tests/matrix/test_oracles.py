"""The update rules against optimizers that others wrote, on random gradients, in fp64."""

import pytest
import torch

from relora_ds.matrix.apollo_update import Apollo
from relora_ds.matrix.bases import random_projection
from relora_ds.matrix.fira_update import Fira
from relora_ds.matrix.muon_update import Muon
from tests.matrix.rules import SHAPES, random, same, trajectory
from tests.parity.one_sided import canonical_svd

STEPS, T, LR, DECAY = 8, 3, 0.01, 0.1


def theirs(make, weight, gradients):
    """W after every step of a PyTorch optimizer. make: the optimizer, from the parameter."""
    parameter = torch.nn.Parameter(weight.clone())
    optimizer, weights = make(parameter), []
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
        weights.append(parameter.detach().clone())
    return torch.stack(weights)


def problem(shape):
    """W and gradients; one of them is large, so that limiters act."""
    gradients = random(STEPS, *shape, seed=1)
    gradients[4] *= 5
    return random(*shape), gradients


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("r", [1, 3])
def test_fira_as_its_authors_wrote_it(r, shape, monkeypatch):
    """With an SVD in fp64 that has a rule for signs in place of theirs."""
    fira = pytest.importorskip("fira")
    from fira.gradient_projection import GradientProjector

    def basis(self, matrix, rank, type):
        left, _, right = canonical_svd(matrix)
        return right[:rank] if type == "right" else left[:, :rank]

    monkeypatch.setattr(GradientProjector, "get_orthogonal_matrix", basis)
    weight, gradients = problem(shape)
    group = dict(rank=r, update_proj_gap=T, alpha=0.25, proj_type="std")
    settings = dict(lr=LR, weight_decay=DECAY, no_deprecation_warning=True)
    expected = theirs(lambda W: fira.FiraAdamW([dict(params=[W], **group)], **settings), weight, gradients)
    same(trajectory(Fira(r, alpha=0.25, update_proj_gap=T), weight, gradients, LR, DECAY), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("r", "scale_type", "scale", "scale_front", "limits"),
    [
        (2, "channel", 1.0, False, True),
        (2, "channel", 1.0, False, False),
        (1, "tensor", 128.0, False, True),
        (1, "tensor", 192.0, True, True),
    ],
)
def test_apollo_as_its_authors_wrote_it(r, scale_type, scale, scale_front, limits, shape, monkeypatch):
    """With our projections in place of theirs."""
    apollo_torch = pytest.importorskip("apollo_torch")
    from apollo_torch.random_projector import GradientProjector

    def projection(self, matrix, rank, type, seed):
        number = self.svd_count
        self.svd_count += 1
        drawn = random_projection(matrix.shape, rank, f"a weight/{number}").to(matrix)
        return drawn if type == "right" else drawn.T

    monkeypatch.setattr(GradientProjector, "get_orthogonal_matrix", projection)
    weight, gradients = problem(shape)
    group = dict(rank=r, update_proj_gap=T, scale=scale, scale_type=scale_type, proj="random", proj_type="std")
    settings = dict(lr=LR, weight_decay=DECAY, scale_front=scale_front, disable_nl=not limits)
    expected = theirs(lambda W: apollo_torch.APOLLOAdamW([dict(params=[W], **group)], **settings), weight, gradients)
    rule = Apollo(r, scale_type=scale_type, scale=scale, scale_front=scale_front, update_proj_gap=T, limits=limits)
    same(trajectory(rule, weight, gradients, LR, DECAY), expected)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
@pytest.mark.parametrize("shape", SHAPES)
def test_muon_as_torch_has_it(shape, adjust, monkeypatch):
    """In the dtype of the weight, where theirs computes in bf16."""
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    weight, gradients = problem(shape)
    settings = dict(lr=LR, weight_decay=DECAY, adjust_lr_fn=adjust)
    expected = theirs(lambda W: torch.optim.Muon([W], **settings), weight, gradients)
    same(trajectory(Muon(adjust=adjust), weight, gradients, LR, DECAY), expected)
