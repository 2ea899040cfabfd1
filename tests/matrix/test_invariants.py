"""What must be equal, or must not exceed what, by the definitions of the rules."""

import pytest
import torch

from relora_ds.matrix import apollo_update
from relora_ds.matrix.adam import ProjectedAdam
from relora_ds.matrix.apollo_update import Apollo
from relora_ds.matrix.fira_update import Fira
from relora_ds.matrix.limiter import limit_growth
from relora_ds.matrix.muon_update import Muon
from relora_ds.matrix.scale_update import Scale
from tests.matrix.rules import SHAPES, random, same, trajectory, updates
from tests.parity.one_sided import GaLore

NO_EPS = ProjectedAdam(eps=1e-30)


def galore(weight, gradients, r, T):
    side = "right" if weight.shape[0] >= weight.shape[1] else "left"
    optimizer = GaLore(weight, r=r, T=T, lr=0.01, alpha=0.25, side=side, style="hf", eps=1e-6)
    weights = []
    for gradient in gradients:
        optimizer.step(gradient)
        weights.append(optimizer.weight)
    return torch.stack(weights)


@pytest.mark.parametrize("shape", SHAPES)
def test_fira_of_the_paper_is_galore_at_the_full_rank_and_the_code_is_not(shape):
    """GaLore is Adam in the basis: nothing is left out of the gradient."""
    weight, gradients = random(*shape), random(7, *shape, seed=1)
    expected = galore(weight, gradients, r=min(shape), T=3)
    same(trajectory(Fira(min(shape), update_proj_gap=3, variant="paper"), weight, gradients), expected)
    assert (trajectory(Fira(min(shape), update_proj_gap=3), weight, gradients) - expected).abs().max() > 1e-2


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_fira_has_galores_update_inside_the_basis(variant):
    """Of the paper: what is added to it lies outside. The code adds 1 - α of the inside too."""
    weight, gradients = random(6, 4), random(1, 6, 4, seed=1)
    rule = Fira(2, update_proj_gap=3, variant=variant)
    state = rule.begin((6, 4), dtype=torch.float64)
    added = trajectory(rule, weight, gradients, state=state) - galore(weight, gradients, r=2, T=3)
    inside = added[0] @ state["basis"].T
    assert added.abs().max() > 1e-3
    assert (inside.abs().max() < 1e-12) == (variant == "paper")


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("shape", SHAPES)
def test_apollo_does_not_see_a_factor_of_the_gradient(shape, scale_type):
    rule = Apollo(2, scale_type=scale_type, limits=False, update_proj_gap=3, adam=NO_EPS)
    gradients = random(7, *shape)
    same(updates(rule, 1e3 * gradients), updates(rule, gradients), 1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_apollo_with_an_orthogonal_projection_of_the_full_rank_has_the_lengths_of_adam(shape, monkeypatch):
    """Rows are as long as Adam's in that basis, which keeps the lengths of the gradient's rows."""
    turn = torch.linalg.qr(random(min(shape), min(shape)))[0]
    monkeypatch.setattr(apollo_update, "random_projection", lambda shape, r, key: turn)
    rule = Apollo(min(shape), limits=False, adam=NO_EPS)
    gradients = random(3, *shape)
    state, adam_state = (r.begin(shape, dtype=torch.float64) for r in (rule, Apollo(min(shape))))
    for gradient in gradients:
        long = gradient if shape[0] >= shape[1] else gradient.T
        normalized, c = NO_EPS.advance(long @ turn.T, torch.tensor([[True]]), adam_state)
        update = rule.update(gradient, state, 1.0, "")
        rows = update if shape[0] >= shape[1] else update.T
        same(rows.norm(dim=1), c * normalized.norm(dim=1), 1e-7)


def test_the_experts_of_apollo_share_a_projection_that_is_drawn_once_for_its_time(monkeypatch):
    drawn = []

    def projection(shape, r, key):
        drawn.append(key)
        return random(r, 4)

    monkeypatch.setattr(apollo_update, "random_projection", projection)
    rule, gradients = Apollo(2, update_proj_gap=3), random(7, 5, 6, 4)
    states = {key: rule.begin((5, 6, 4), dtype=torch.float64) for key in ("a", "b")}
    for gradient in gradients:
        for key, state in states.items():
            rule.update(gradient, state, 1.0, key)
    assert drawn == ["a/0", "b/0", "a/1", "b/1", "a/2", "b/2"]


@pytest.mark.parametrize("factor", [1.0, 128.0])
def test_the_limiter_sees_the_scale_of_apollo_if_it_comes_first(factor):
    state = {}
    for front in (False, True):
        rule = Apollo(1, scale_type="tensor", scale=factor, scale_front=front)
        state[front] = rule.begin((6, 4), dtype=torch.float64)
        rule.update(random(6, 4), state[front], 1.0, "")
    same(state[True]["norm"], factor**0.5 * state[False]["norm"])


def test_no_update_is_longer_than_the_limited_one_before_it_by_more_than_a_hundredth():
    has_gradient = torch.ones(2, 1, 1, dtype=torch.bool)
    state = {"norm": torch.zeros(2, 1, 1, dtype=torch.float64)}
    lengths = torch.tensor([[1, 1], [50, 1.005], [50, 0.5], [0.25, 9]], dtype=torch.float64)
    found = []
    for step, length in enumerate(lengths):
        matrices = random(2, 6, 4, seed=step)
        matrices *= length.view(2, 1, 1) / torch.linalg.matrix_norm(matrices, keepdim=True)
        limited = limit_growth(matrices, has_gradient, state)
        found.append(torch.linalg.matrix_norm(limited))
        same(found[-1], state["norm"].flatten())
    same(torch.stack(found), torch.tensor([[1, 1], [1.01, 1.005], [1.0201, 0.5], [0.25, 0.505]]).double(), 1e-7)


@pytest.mark.parametrize(("kind", "dim"), [("hidden", -1), ("head", -1), ("embedding", -2)])
def test_scale_gives_rows_or_columns_a_root_mean_square_of_1(kind, dim):
    gradients = random(3, 2, 6, 4)
    gradients[:, 0, 1], gradients[:, 1, :, 2] = 0.0, 0.0
    found = updates(Scale(kind), gradients).square().mean(dim).sqrt()
    expected = torch.ones_like(found)
    if kind == "embedding":
        expected[:, 1, 2] = 0  # the column without a gradient
    else:
        expected[:, 0, 1] = 0  # the row
    same(found, expected)


def test_only_the_head_of_scale_has_a_state():
    assert Scale("head").begin((6, 4)) and not Scale("hidden").begin((6, 4)) and not Scale("embedding").begin((6, 4))


def test_experts_of_muon_are_as_long_as_their_own_shape_says():
    """Not as the number of experts says."""
    update = updates(Muon(adjust="original"), random(1, 50, 8, 8))
    values = torch.linalg.svdvals(update[0])
    assert values.max() < 1.3
