"""Bases and random projections."""

import pytest
import torch

from relora_ds.matrix import bases
from relora_ds.matrix.apollo_update import Apollo
from relora_ds.matrix.bases import dominant_basis, projected_shape, random_projection, unit_basis
from relora_ds.matrix.fira_update import Fira
from tests.matrix.rules import SHAPES, random, same, updates
from tests.parity.one_sided import canonical_svd


@pytest.mark.parametrize("shape", SHAPES)
def test_a_basis_is_of_singular_vectors_of_the_shorter_side_with_signs_by_a_rule(shape):
    gradient = random(3, *shape)
    for one, basis in zip(gradient, dominant_basis(gradient, 3), strict=True):
        left, _, right = canonical_svd(one)
        same(basis, right[:3] if shape[0] >= shape[1] else left[:, :3].T)


def rank_deficient():
    """Matrices `[6, 4]` in fp32 with fewer than four different directions."""
    one = torch.outer(random(6), random(4))
    return {
        "0": torch.zeros(6, 4),
        "rank 1": one.float(),
        "rank 1, small": (1e-30 * one).float(),
        "rank 1, large": (1e30 * one).float(),
        "rank 2": (random(6, 2) @ random(2, 4)).float(),
        "equal entries": torch.ones(6, 4),
        "one entry": torch.zeros(6, 4).index_fill(0, torch.tensor(2), 1.0) * torch.eye(4)[1],
        "equal singular values": torch.eye(6, 4),
    }


@pytest.mark.parametrize("name", rank_deficient())
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_gradient_of_low_rank_has_an_orthonormal_basis_too(name, side):
    gradient = rank_deficient()[name]
    basis = dominant_basis(gradient if side == "right" else gradient.T, 3)
    same(basis @ basis.T, torch.eye(3), 1e-5)
    directions = gradient / gradient.abs().max().clamp_min(1e-38)
    if name != "equal singular values":  # its rank is 4
        same(directions @ basis.T @ basis, directions, 1e-5)


@pytest.mark.parametrize("name", rank_deficient())
@pytest.mark.parametrize("variant", ["code", "paper"])
def test_fira_takes_gradients_of_low_rank(name, variant):
    gradients = rank_deficient()[name].expand(7, 6, 4)
    assert updates(Fira(3, update_proj_gap=2, variant=variant), gradients).isfinite().all()


def test_a_decomposition_that_does_not_converge_leaves_the_basis_as_it_is(monkeypatch):
    def fails(*args, **kwargs):
        raise torch.linalg.LinAlgError

    rule, gradients = Fira(2, update_proj_gap=1), random(2, 6, 4)
    state = rule.begin((6, 4), dtype=torch.float64)
    rule.update(gradients[0], state, 1.0, "")
    before = state["basis"].clone()
    monkeypatch.setattr(bases.torch.linalg, "svd", fails)
    assert rule.update(gradients[1], state, 1.0, "").any()
    assert torch.equal(state["basis"], before)


def test_r_is_at_most_the_shorter_side_of_a_basis():
    state = Fira(100).begin((3, 6, 4))
    assert state["basis"].shape == (3, 4, 4) and state["m"].shape == (3, 6, 4)


@pytest.mark.parametrize("shape", SHAPES)
def test_r_is_at_most_the_shorter_side_of_a_random_projection(shape):
    large, whole = Apollo(100, update_proj_gap=2), Apollo(min(shape), update_proj_gap=2)
    assert large.kept_bytes(shape) == 4 * min(shape) ** 2
    assert large.begin(shape)["m"].shape == (max(shape), min(shape))
    gradients = random(3, *shape)
    assert torch.equal(updates(large, gradients), updates(whole, gradients))


@pytest.mark.parametrize(("shape", "longer"), [((6, 4), 6), ((4, 6), 6), ((2, 3, 4, 6), 6)])
def test_shapes(shape, longer):
    assert projected_shape(shape, 2) == [*shape[:-2], longer, 2]
    assert unit_basis(shape, 2, "cpu", torch.float32).shape == (*shape[:-2], 2, 4)
    assert random_projection(shape, 2, "").shape == (2, 4)


def test_the_key_decides_a_projection():
    drawn = random_projection((400, 300), 100, "a/0")
    assert torch.equal(drawn, random_projection((300, 500), 100, "a/0"))
    assert not torch.equal(drawn, random_projection((400, 300), 100, "a/1"))
    assert drawn.mean().abs() < 2e-3 and (drawn.var() - 1 / 100).abs() < 5e-4
