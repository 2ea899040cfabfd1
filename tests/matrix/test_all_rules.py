"""What holds for every update rule: experts, missing gradients, resume, keys."""

import io
import re

import pytest
import torch

from relora_ds.matrix.adam import ProjectedAdam
from relora_ds.matrix.apollo_update import Apollo
from relora_ds.matrix.fira_update import Fira
from relora_ds.matrix.muon_update import Muon
from relora_ds.matrix.scale_update import Scale
from relora_ds.matrix.sst_update import SST
from relora_ds.zero.owner_steps import COPIES
from tests.matrix.rules import RULES, SHAPES, random, same, updates
from tests.peak_bytes import PeakBytes

every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
EXPERTS, STEPS = 3, 7


def of_experts(shape, seed=1, dtype=torch.float64):
    """Gradients `[steps, experts, out, in]` of different lengths; one step is a spike for one expert."""
    gradients = random(STEPS, EXPERTS, *shape, seed=seed, dtype=dtype)
    gradients *= torch.tensor([1e-3, 1.0, 30.0], dtype=dtype).view(EXPERTS, 1, 1)
    gradients[4, 1] *= 50
    return gradients


@every_rule
@pytest.mark.parametrize("shape", SHAPES)
def test_experts_do_not_know_of_each_other(rule, shape):
    gradients = of_experts(shape)
    together = updates(rule(), gradients)
    for expert in range(EXPERTS):
        same(together[:, expert], updates(rule(), gradients[:, expert]))
    same(updates(rule(), gradients.unsqueeze(1))[:, 0], together)


# Experts beside the first, which has a gradient always: in which steps theirs is 0, or has such values. T is 3.
MISSING = [(0.0, (0,)), (0.0, (3, 5)), (torch.nan, (0, 1)), (torch.nan, (3,)), (torch.inf, (2, 3))]


@every_rule
@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_without_a_gradient_keeps_w_and_its_state(rule, shape):
    gradients = random(STEPS, 1 + len(MISSING), *shape)
    expected = updates(rule(), gradients[:, :1], lr=0.01)
    rule = rule()
    state = rule.begin(gradients.shape[1:], dtype=torch.float64)
    for step, gradient in enumerate(gradients):
        missing = [expert for expert, (_, steps) in enumerate(MISSING, start=1) if step in steps]
        for expert in missing:
            value = MISSING[expert - 1][0]
            gradient[expert] = torch.where(gradient[expert] > 0, value, gradient[expert]) if value else 0
        before = {key: tensor.clone() for key, tensor in state.items()}
        update = rule.update(gradient, state, 0.01, "a weight")
        assert update.isfinite().all() and all(tensor.isfinite().all() for tensor in state.values())
        assert [expert for expert, of_expert in enumerate(update) if not of_expert.any()] == missing
        assert all(torch.equal(state[key][missing], before[key][missing]) for key in state if key != "step")
        same(update[:1], expected[step])


@every_rule
def test_no_gradient_at_all(rule):
    assert not updates(rule(), torch.zeros(STEPS, 6, 4)).any()


@every_rule
@pytest.mark.parametrize("size", [1e-18, 1e-20, 1e-22, 1e-30, 1e15])
def test_sizes_at_the_ends_of_fp32_give_no_nan(rule, size):
    gradients = (size * of_experts((6, 4))).float()
    rule = rule()
    state = rule.begin(gradients.shape[1:])
    for gradient in gradients:
        update = rule.update(gradient, state, 1.0, "a weight")
        assert update.isfinite().all() and all(tensor.isfinite().all() for tensor in state.values())
        assert torch.linalg.matrix_norm(update).max() < 200


@every_rule
@pytest.mark.parametrize("experts", [(), (EXPERTS,)], ids=str)
def test_a_state_that_was_saved_and_loaded_continues_to_the_bit(rule, experts):
    gradients = random(STEPS, *experts, 6, 4, dtype=torch.float32)
    expected = updates(rule(), gradients)
    for saved_after in range(STEPS):
        first, second, file = rule(), rule(), io.BytesIO()
        state = first.begin(gradients.shape[1:])
        for gradient in gradients[:saved_after]:
            first.update(gradient, state, 1.0, "a weight")
        torch.save(state, file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        for gradient, update in zip(gradients[saved_after:], expected[saved_after:], strict=True):
            assert torch.equal(second.update(gradient, state, 1.0, "a weight"), update)


@every_rule
def test_a_state_is_of_fp32_and_counts_on_the_host(rule):
    state = rule().begin((2, 6, 4))
    for key, tensor in state.items():
        is_count = key == "step"
        assert tensor.dtype == (torch.int64 if is_count else torch.float32) and tensor.is_cpu
        assert tensor.shape == () if is_count else tensor.shape[0] == 2
    meta = rule().begin((2, 6, 4), device="meta")
    assert all(tensor.is_cpu if key == "step" else tensor.is_meta for key, tensor in meta.items())


@every_rule
@pytest.mark.parametrize("shape", SHAPES)
def test_updates_are_new_tensors_and_gradients_stay(rule, shape):
    gradient, rule = random(*shape), rule()
    update = rule.update(gradient, rule.begin(shape, dtype=torch.float64), 1.0, "a weight")
    update.zero_()
    assert update.shape == shape and torch.equal(gradient, random(*shape))


@pytest.mark.parametrize("shape", [(256, 256), (2, 128, 128)])
def test_the_most_that_updates_have_on_a_device_is_what_plans_count(shape):
    """Of matrices as large as the gradient; a basis of the full rank is the most that Fira can have."""
    rules = [*(make() for make in RULES.values()), Fira(256), Apollo(128)]
    peaks = []
    for rule in rules:
        state, gradient = rule.begin(shape), random(*shape, dtype=torch.float32)
        with PeakBytes() as memory:
            rule.update(gradient, state, 0.1, "a weight")
        peaks.append(memory.peak / gradient.nbytes)
    assert COPIES - 0.1 < max(peaks) < COPIES + 0.1


@pytest.mark.parametrize("r", [8, 256])
def test_a_rule_that_reads_w_has_no_more_with_it(r):
    """Also where it is decomposed anew, from its factors."""
    rule = SST(r, iteration_steps=1)
    state, gradient, weight = rule.begin((256, 256)), *(random(256, 256, dtype=torch.float32) for _ in range(2))
    peaks = []
    for _ in range(256 // r + 1):
        with PeakBytes() as memory:
            change = rule.update(gradient, state, 0.1, "a weight", weight)
        weight = weight + change
        peaks.append(1 + memory.peak / gradient.nbytes)
    assert 2 < max(peaks) < COPIES + 0.1


@every_rule
@pytest.mark.parametrize("shape", SHAPES)
def test_an_update_goes_down_and_is_proportional_to_the_learning_rate(rule, shape):
    gradients = random(1, *shape)
    update = updates(rule(), gradients)
    assert (update * gradients).sum() < 0
    same(updates(rule(), gradients, lr=0.25), 0.25 * update)


@every_rule
def test_the_key_decides_projections_and_nothing_else_is_random(rule):
    gradients = random(STEPS, 6, 4)
    torch.manual_seed(1)
    once, state = updates(rule(), gradients), torch.get_rng_state()
    torch.manual_seed(2)
    assert torch.equal(updates(rule(), gradients), once)
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "the global generator was drawn from"
    assert torch.equal(updates(rule(), gradients, key="another"), once) != isinstance(rule(), Apollo)


@every_rule
def test_updates_are_computed_in_fp32_whatever_a_process_has_chosen(rule):
    gradients = random(STEPS, 6, 4, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        update = updates(rule(), gradients)
    assert torch.equal(update, updates(rule(), gradients))


def test_which_rules_decay_before_the_update():
    """SCALE and Muon as torch's AdamW; the others as GaLore's release."""
    assert {name for name, rule in RULES.items() if rule().decays_first} == {
        "scale",
        "scale of the head",
        "scale of the embedding",
        "muon",
    }


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Fira(0), "Fira.r: 0"),
        (lambda: Fira(4, update_proj_gap=0), "Fira.update_proj_gap: 0"),
        (lambda: Fira(4, alpha=-1.0), "Fira.alpha: -1.0"),
        (lambda: Fira(4, variant="other"), "Fira.variant: 'other'"),
        (lambda: Apollo(4, scale_type="rows"), "Apollo.scale_type: 'rows'"),
        (lambda: Apollo(4, scale=0.0), "Apollo.scale: 0"),
        (lambda: Scale("layer"), "Scale.kind: 'layer'"),
        (lambda: Scale(momentum=1.0), "Scale.momentum: 1"),
        (lambda: Muon(momentum=2.0), "Muon.momentum: 2"),
        (lambda: Muon(adjust="adamw"), "Muon.adjust: 'adamw'"),
        (lambda: Muon(precision="fp8"), "Muon.precision: 'fp8'"),
        (lambda: ProjectedAdam((0.9, 1.0)), "ProjectedAdam.betas"),
    ],
)
def test_settings_that_are_wrong_are_named(make, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        make()
