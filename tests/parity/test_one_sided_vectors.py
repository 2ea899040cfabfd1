"""The plain reference of one-sided chains against numbers and code that do not come from here, in fp64."""

import pytest
import torch

from tests.parity.one_sided import Chain, GaLore, canonical_svd, right_basis, rotated
from tests.vectors import vectors

CASES = {case["name"]: case for case in vectors("galore/given_gradients")["cases"]}
RIGHT = [name for name, case in CASES.items() if case["side"] == "right"]


def adam(case):
    return dict(betas=tuple(case["betas"].tolist()), eps=case["eps"], style=case["adam_style"])


def galore(case, **changes):
    settings = dict(r=case["r"], T=case["T"], lr=case["lr"], alpha=case["alpha"], side=case["side"])
    return GaLore(case["W0"], **{**settings, "weight_decay": case["weight_decay"], **adam(case), **changes})


def trajectory(optimizer, gradients):
    weights = []
    for gradient in gradients:
        optimizer.step(gradient)
        weights.append(optimizer.weight)
    return torch.stack(weights)


def same(ours, theirs, tolerance=1e-9):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CASES)
def test_galore_with_given_gradients(name):
    case = CASES[name]
    optimizer = galore(case)
    same(trajectory(optimizer, case["G"]), case["W"])
    assert [str(step) for step in optimizer.bases] == list(case["basis"])
    for step, basis in case["basis"].items():
        ours = optimizer.bases[int(step)]
        same(ours if case["side"] == "right" else ours.T, basis)
    ends = optimizer.moments.m, optimizer.moments.v
    same(ends[0] if case["side"] == "right" else ends[0].T, case["m_end"])
    same(ends[1] if case["side"] == "right" else ends[1].T, case["v_end"])


@pytest.mark.parametrize("scaling", [1.0, 4.0])
@pytest.mark.parametrize("name", RIGHT)
def test_the_chain_is_galore(name, scaling):
    """With lr·alpha/s and s·eps, whatever s is; and W does not move at a merge."""
    case = CASES[name]
    settings = {**adam(case), "eps": scaling * case["eps"], "weight_decay": case["weight_decay"]}
    lr = case["alpha"] * case["lr"] / scaling
    chain = Chain(case["W0"], case["basis"]["0"], lr=lr, scaling=scaling, decay_after=True, **settings)
    for step, gradient in enumerate(case["G"]):
        if step and str(step) in case["basis"]:
            before = chain.weight
            chain.refresh(case["basis"][str(step)])
            same(chain.weight, before, 1e-15)
        chain.step(chain.gradient(gradient), decay_lr=case["lr"])
        same(chain.weight, case["W"][step])
    same(chain.moments.m / scaling, case["m_end"])
    same(chain.moments.v / scaling**2, case["v_end"])


@pytest.mark.parametrize("name", [name for name in CASES if CASES[name]["adam_style"] == "hf"])
def test_the_authors_own_code(name, monkeypatch):
    """galore-torch, with an SVD in fp64 that has a rule for signs in place of its own."""
    galore_torch = pytest.importorskip("galore_torch")
    from galore_torch.galore_projector import GaLoreProjector

    def basis(self, weights, rank, type):
        left, _, right = canonical_svd(weights)
        return right[:rank] if type == "right" else left[:, :rank]

    monkeypatch.setattr(GaLoreProjector, "get_orthogonal_matrix", basis)
    case = CASES[name]
    weight = torch.nn.Parameter(case["W0"].clone())
    low_rank = dict(rank=case["r"], update_proj_gap=case["T"], scale=case["alpha"], proj_type="std")
    settings = dict(lr=case["lr"], weight_decay=case["weight_decay"], eps=case["eps"], no_deprecation_warning=True)
    theirs = galore_torch.GaLoreAdamW([dict(params=[weight], **low_rank)], **settings)
    ours = galore(case)
    for gradient in case["G"]:
        weight.grad = gradient.clone()
        theirs.step()
        ours.step(gradient)
        same(weight.detach(), ours.weight)


def test_the_sign_of_one_row_of_the_basis_moves_the_weight_where_moments_are_carried():
    case = CASES["right"]
    flipped = case["basis"]["3"] * torch.tensor([[-1.0], [1.0]])
    bases = iter([case["basis"]["0"], flipped, case["basis"]["6"]])
    other = trajectory(galore(case, basis=lambda gradient, r: next(bases)), case["G"])
    moved = (other - case["W"]).abs().amax((1, 2))
    same(moved, vectors("galore/sign")["max_abs_difference"])


def lsq_gradient(weight, X, Y):
    return (X @ weight.T - Y).T @ X / len(X)


@pytest.mark.parametrize("scaling", [1.0, 4.0])
@pytest.mark.parametrize("num_ranks", [1, 2])
def test_least_squares_through_the_chain_on_one_and_two_ranks(num_ranks, scaling):
    """Ranks average gradients of [out, r]: the mean of projections is the projection of the mean."""
    case = vectors("galore/lsq")
    parts = list(zip(case["X"].chunk(num_ranks), case["Y"].chunk(num_ranks), strict=True))
    chain = None
    for step, expected in enumerate(case["W"]):
        weight = case["W0"] if chain is None else chain.weight
        error = case["X"] @ weight.T - case["Y"]
        same(error.pow(2).sum() / (2 * len(error)), case["loss_before_step"][step])
        if step % case["T"] == 0:
            Q = right_basis(lsq_gradient(weight, case["X"], case["Y"]), case["r"])
            if chain is None:
                lr, eps = case["alpha"] * case["lr"] / scaling, scaling * case["eps"]
                chain = Chain(weight, Q, lr=lr, scaling=scaling, eps=eps, style="hf")
            else:
                chain.refresh(Q)
        projected = [chain.gradient(lsq_gradient(weight, X, Y)) for X, Y in parts]
        chain.step(torch.stack(projected).mean(0))
        same(chain.weight, expected)


def test_full_rank_is_adam_in_the_rotated_basis():
    case = vectors("galore/full_rank")
    settings = dict(r=4, T=100, lr=case["lr"], alpha=1.0, eps=case["eps"], style="hf")
    same(trajectory(GaLore(case["W0"], **settings), case["G"]), case["W_rotated"])
    plain = GaLore(case["W0"], basis=lambda gradient, r: torch.eye(r, dtype=gradient.dtype), **settings)
    same(trajectory(plain, case["G"]), case["W_adam"])
    assert (case["W_rotated"] - case["W_adam"]).abs().max() > 1e-2


def turned(case, turn, how):
    """W after every step with a second basis that spans the same rows as the first."""
    chain = Chain(case["W0"], case["basis"]["0"], lr=1e-2, scaling=1.0, moments=how, **adam(case))
    for step, gradient in enumerate(case["G"]):
        if step == 3:
            chain.refresh(turn @ chain.Q)
        chain.step(chain.gradient(gradient))
    return chain.weight


def test_rotated_moments_do_not_depend_on_signs_and_order():
    case = CASES["right"]
    identity = torch.eye(2, dtype=torch.float64)
    signs_and_order = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    same(turned(case, signs_and_order, "rotate"), turned(case, identity, "rotate"))
    assert (turned(case, signs_and_order, "carry") - turned(case, identity, "carry")).abs().max() > 1e-3


def test_rotation_by_the_identity_keeps_moments_and_never_makes_v_negative():
    m, v = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    v = v**2
    kept = rotated(m, v, torch.eye(3, dtype=torch.float64), (0.9, 0.999), 7)
    same(kept[0], m, 1e-14)
    same(kept[1], v, 1e-14)
    turn = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))[0]
    assert (rotated(m, v, turn, (0.9, 0.999), 7)[1] >= 0).all()
