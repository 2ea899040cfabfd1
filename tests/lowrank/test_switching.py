"""Switches of rows of A and columns of B, and Adam with a step count for each vector: in one process, in fp64."""

import itertools
import math

import pytest
import torch

from relora_ds.lowrank import switching
from relora_ds.lowrank.vector_adam import update_, vector_steps
from tests.vectors import vectors

CASES = vectors("switchlora/vectors")
BETAS, EPS = (0.9, 0.999), 1e-8


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def same(ours, theirs, tolerance=1e-9):
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


# -- initial factors and schedule ------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES["init"], ids=lambda case: f"{case['m']}x{case['n']}, {case['r']}")
def test_sizes_of_initial_factors(case):
    std_A, std_B = switching.factor_stds(case["m"], case["n"], case["r"])
    assert (std_A, std_B) == pytest.approx((case["std_A"], case["std_B"]), rel=1e-12)
    assert math.sqrt(3) * std_A == pytest.approx(case["bound_A"], rel=1e-12)


def test_draws_have_the_size_asked_for():
    value = switching.drawn(300, 400, 0.5, "a key")
    assert value.std().item() == pytest.approx(0.5, rel=0.01)
    assert value.abs().max() <= math.sqrt(3) * 0.5
    assert torch.equal(value, switching.drawn(300, 400, 0.5, "a key"))


def test_schedule():
    case = CASES["schedule"]
    how = dict(first=case["interval0"], ratio=case["ratio"])
    for t, expected in case["interval"].items():
        assert switching.interval(int(t), case["total"], **how) == pytest.approx(expected, rel=1e-12)
        in_a_step = case["expected_switches_per_step_r128"][t]
        assert 128 / switching.interval(int(t), case["total"], **how) == pytest.approx(in_a_step, rel=1e-12)
    in_all = sum(128 / switching.interval(t, case["total"], **how) for t in range(case["total"]))
    assert in_all == pytest.approx(case["expected_switches_in_run_r128"], rel=1e-9)


def test_numbers_of_switches_have_no_bias():
    numbers = [switching.num_switched(2.3, f"0/{step}/a layer/A") for step in range(4000)]
    assert {*numbers} == {2, 3}
    assert sum(numbers) / len(numbers) == pytest.approx(2.3, abs=0.03)


def test_windows_go_in_circles():
    assert switching.window(2, 3, 4) == [2, 3, 0]
    assert switching.window(9, 0, 4) == []


# -- a switch --------------------------------------------------------------------------------------------------------


def test_a_switch_of_both_kinds():
    case = CASES["switch"]
    weight, lora_A, lora_B = case["W"], case["A"].clone(), case["B"].clone()
    rows, columns = [case["row"]], [case["column"]]
    before = lora_B[:, case["row"]] @ case["G_of_W"] * case["s"]
    down, up = switching.switch_(
        lora_A, lora_B, rows, case["candidate_row_of_A"][None], columns, case["candidate_column_of_B"][:, None]
    )
    weight = weight + case["s"] * up @ down
    same(weight, case["W_after"])
    same(lora_A, case["A_after"])
    same(lora_B, case["B_after"])
    same(case["X"] @ (weight + case["s"] * lora_B @ lora_A).T, case["Y_after"])
    same(case["Y_after"], case["Y_before"])
    same(before, case["dA_row0_before"])
    same(lora_B[:, case["row"]] @ case["G_of_W"] * case["s"], case["dA_row0_after"])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize(("rows", "columns"), [([0, 2], [3]), ([1, 3], [1, 0]), ([], [2]), ([0], []), ([], [])])
def test_many_switches_keep_the_function(rows, columns, dtype, tolerance):
    """Also where a row and the column of the same number are switched."""
    weight, lora_A, lora_B = random(7, 5, dtype=dtype), random(4, 5, dtype=dtype), random(7, 4, dtype=dtype)
    before = weight + 0.25 * lora_B @ lora_A
    down, up = switching.switch_(
        lora_A, lora_B, rows, random(len(rows), 5, dtype=dtype), columns, random(7, len(columns), dtype=dtype)
    )
    assert down.shape == (len(rows) + len(columns), 5)
    after = weight + 0.25 * up @ down + 0.25 * lora_B @ lora_A
    same(after, before, tolerance)


@pytest.mark.parametrize(("start", "stop"), [(0, 35), (0, 10), (10, 35), (3, 4), (3, 17), (12, 35), (35, 35)])
def test_a_piece_of_a_weight_gets_its_part(start, stop):
    first, second, weight = (random(*shape, dtype=torch.float32) for shape in ((7, 2), (2, 5), (7, 5)))
    whole = weight + 0.5 * first @ second
    piece = weight.view(-1)[start:stop].clone()
    switching.add_part_(piece, start, 5, first, second, 0.5)
    same(piece, whole.view(-1)[start:stop], 1e-6)


# -- Adam ------------------------------------------------------------------------------------------------------------


def of_a_run(gradients, resets_at, freeze_steps, lr=0.1):
    """The values of one vector after each step, by `update_`."""
    values, exp_avg, exp_avg_sq = torch.zeros(3, gradients.shape[1], dtype=torch.float64)
    of, resets, seen = torch.zeros(gradients.shape[1], dtype=torch.int32), torch.zeros(1, dtype=torch.int64), []
    for step, gradient in enumerate(gradients, 1):
        if step - 1 in resets_at:
            resets[0] = step - 1
        how = dict(freeze_steps=freeze_steps, lr=lr, betas=BETAS, dtype=torch.float64)
        steps = vector_steps(step, resets, **how)
        update_(values, gradient, exp_avg, exp_avg_sq, of, steps, betas=BETAS, eps=EPS)
        seen.append(values.clone())
    return torch.stack(seen), exp_avg


def test_without_a_reset_it_is_adam():
    gradients = random(12, 6)
    weight = torch.nn.Parameter(torch.zeros(6, dtype=torch.float64))
    adam = torch.optim.Adam([weight], lr=0.1, betas=BETAS, eps=EPS)
    found, _ = of_a_run(gradients, [], 5)
    for gradient, ours in zip(gradients, found, strict=True):
        weight.grad = gradient.clone()
        adam.step()
        same(ours, weight.detach(), 1e-12)


def test_steps_after_a_freeze():
    case = CASES["adam_after_freeze"]
    assert case["step_counts_while_frozen"]
    found, _ = of_a_run(torch.ones(3 + 8, 1, dtype=torch.float64), [3], int(case["freeze"]), lr=1.0)
    steps = -torch.diff(found[2:, 0])
    same(steps, case["updates_over_lr"])


def test_what_a_frozen_vector_has_seen_does_not_matter():
    gradients = random(14, 6)
    others = torch.cat([random(8, 6, seed=1), gradients[8:]])
    (one, m), (other, _) = of_a_run(gradients, [3], 5), of_a_run(others, [3], 5)
    same(one[8:] - one[7], other[8:] - other[7], 1e-12)
    assert (one[3:8] == one[2]).all() and m.any()


def test_each_vector_has_its_own_count():
    of = torch.tensor([0, 1, 1, 0, 2])
    resets = torch.tensor([0, 4, 9])
    steps = vector_steps(10, resets, freeze_steps=5, lr=1.0, betas=BETAS)
    assert steps.trains.tolist() == [1, 1, 0] and steps.size[2] == 0
    assert steps.size[1].item() == pytest.approx(1 / (1 - 0.9**6))
    assert steps.root.tolist() == pytest.approx([math.sqrt(1 - 0.999**count) for count in (10, 6, 1)], rel=1e-6)
    values, m, v = torch.zeros(5), torch.zeros(5), torch.zeros(5)
    update_(values, torch.ones(5), m, v, of, steps, betas=BETAS, eps=EPS)
    for a, b in itertools.combinations(range(5), 2):
        assert (values[a] == values[b]) == (of[a] == of[b])
    assert values[4] == m[4] == v[4] == 0
