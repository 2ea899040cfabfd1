"""Steps of factors: a skipped step, resume in the middle of an iteration and over a decomposition, bytes, refusals."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

import relora_ds
from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.wrap import owned_layers
from relora_ds.matrix import spectral
from relora_ds.matrix.muon_update import Muon
from relora_ds.matrix.sst_update import SST
from relora_ds.zero import factor_steps
from relora_ds.zero.traffic import count_traffic
from tests.parity import cases, owner, sst
from tests.ranks import ranks
from tests.small_models import FAMILIES
from tests.zero.test_nonfinite import spoiled_step
from tests.zero.test_owner_steps import all_of, train

# Of k and v rounds have six steps: both are within an iteration, and the first is before a decomposition, of which the
# second sees another one.
SAVED_AT, END, ROUND = 5, 14, 6


def spoiled(stage, precision, after) -> tuple[bool, list[str]]:
    engine = sst.build(stage, precision=precision)
    train(engine, 0, after)
    before = all_of(engine)
    spoiled_step(engine, float("nan"))
    now, applied = all_of(engine), engine.was_step_applied()
    cases.release(engine)
    return applied, [what for what in before if before[what] != now[what]]


@pytest.mark.each_value_once
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing(stage, precision):
    """Within an iteration, and where k and v are decomposed."""
    for after in (4, ROUND):
        assert ranks(2).run(spoiled, stage, precision, after) == [(False, [])] * 2


def run(stage, precision, directory: str, resumes: bool, end: int = END, saved_at: int = SAVED_AT) -> dict:
    engine = sst.build(stage, precision=precision, model_seed=int(resumes))
    if resumes:
        engine.load_checkpoint(directory)
    else:
        train(engine, 0, saved_at)
        engine.save_checkpoint(directory)
    result = {"losses": train(engine, saved_at, end), "end": all_of(engine), "weights": engine.collect_merged()}
    cases.release(engine)
    return result


@pytest.mark.each_value_once
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_resume_to_the_bit(stage, precision, tmp_path):
    whole, again = (ranks(2).run(run, stage, precision, str(tmp_path), resumes) for resumes in (False, True))
    for one, other in zip(whole, again, strict=True):
        assert one["losses"] == other["losses"] and one["end"] == other["end"]


@pytest.mark.parametrize("saved_at", [ROUND, pytest.param(0, marks=pytest.mark.slow)])
def test_a_resume_where_a_round_begins(saved_at, tmp_path):
    whole, again = (ranks(2).run(run, 1, "fp32", str(tmp_path), resumes, END, saved_at) for resumes in (False, True))
    assert whole[0]["losses"] == again[0]["losses"] and whole[0]["end"] == again[0]["end"]


def without_a_gradient(stage, at, on_all) -> tuple[bool, bool, list[float]]:
    """One weight has no gradient in a step: whether its state moved, and that of another; and later losses."""
    engine = sst.build(stage)
    train(engine, 0, at)
    # The owner's, and its neighbour's: k is decomposed at step 6.
    name, other = (f"model.layers.0.self_attn.{kind}_proj" for kind in "kv")
    factors = engine.owner_steps._factors
    before = {each: {what: value.clone() for what, value in factors[each].items()} for each in (name, other)}
    tokens = cases.batch(at, cases.GLOBAL_BATCH).chunk(dist.get_world_size())[dist.get_rank()]
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    if on_all or dist.get_rank() == 0:
        engine.frozen.layers[name].gradient_sum.values.zero_()
    engine.step()
    moved = [
        any(not torch.equal(factors[each][what], value) for what, value in before[each].items()) for each in before
    ]
    losses = train(engine, at + 1, at + 8)
    cases.release(engine)
    return *moved, losses


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("at", [4, ROUND - 1])
def test_a_weight_without_a_gradient_waits_on_all_ranks(stage, at):
    """Where it has one on any rank, all of them move."""
    for on_all in (True, False):
        one, other = ranks(2).run(without_a_gradient, stage, at, on_all)
        assert one == other and one[:2] == (not on_all, True)


@pytest.mark.parametrize(("saved", "loaded"), [((1, 2), (3, 1)), pytest.param((3, 2), (0, 1), marks=pytest.mark.slow)])
def test_another_stage_and_number_of_ranks(saved, loaded, tmp_path):
    """(stage, ranks) each. Other ranks draw the same columns."""
    expected = ranks(saved[1]).run(run, saved[0], "fp32", str(tmp_path), False, sst.STEPS)[0]
    found = ranks(loaded[1]).run(run, loaded[0], "fp32", str(tmp_path), True, sst.STEPS)[0]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)


def of_factors(stage, **relora) -> dict:
    """After steps over a decomposition: masters against factors, and what forward reads."""
    engine = sst.build(stage, precision="bf16", relora=owner.config(**relora))
    train(engine, 0, 8)
    frozen, held, stored = engine.frozen, engine.owner_steps.held(), cases.stored_weights(engine)
    found = {"names": [], "stored": {name: value.float().sum().item() for name, value in stored.items()}}
    for name in frozen.layers:
        if (value := frozen.read(name, engine.device)) is not None:
            product = spectral.product(*(held[f"{name}/{what}"] for what in ("left", "sigma", "right")))
            assert torch.equal(value, product if frozen.with_masters else frozen.quantize(product).float())
            assert torch.equal(frozen.quantize(product).reshape(-1), stored[name].reshape(-1))
            found["names"].append(name)
    cases.release(engine)
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_masters_are_the_product_of_factors_and_all_ranks_have_it_rounded(stage):
    """Without masters too: no step adds to what has been rounded."""
    for master in ("cpu", "none"):
        one, other = ranks(2).run(of_factors, stage, frozen_master=master)
        assert one["stored"] == other["stored"] and one["names"] and other["names"]


def other_factors(stage) -> str:
    """Of ranks that have come to hold other factors: what says so."""
    engine = sst.build(stage)
    train(engine, 0, 1)
    next(iter(engine.owner_steps._factors.values()))["right"].mul_(1 + dist.get_rank())
    with mock.patch.object(factor_steps, "VERIFIED_EVERY", 2), pytest.raises(RuntimeError) as caught:
        train(engine, 1, 3)
    cases.release(engine)
    return str(caught.value)


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_ranks_that_form_other_weights_are_noticed(stage):
    for said in ranks(2).run(other_factors, stage):
        assert said.startswith("steps of factors: ")


def transposed(stage) -> float:
    """GPT-2's weights are `[in, out]`: the change of an update with a learning rate of 0."""
    engine = cases.build(
        stage,
        family="gpt2",
        matrix_optimizer=SST(4),
        matrix_lr=1e-30,
        relora=owner.config(),
        weight_decay=0.0,
    )
    before = engine.collect_merged()
    train(engine, 0, 2)
    after = engine.collect_merged()
    names = [layer.plain_name(name) for name, layer in engine.frozen.layers.items() if layer.transposed]
    cases.release(engine)
    return max(((after[name] - before[name]).norm() / before[name].norm()).item() for name in names)


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_weights_that_are_stored_transposed_are_decomposed_as_they_multiply(stage):
    assert max(ranks(2).run(transposed, stage)) < 1e-6


def sent(stage) -> tuple[list[torch.Size], list[tuple[bool, int, int]]]:
    """Of steps: whether more was announced than other steps send, and the payloads of both halves."""
    engine = sst.build(stage, precision="bf16")
    found = []
    for number in range(8):
        tokens = cases.batch(number, cases.GLOBAL_BATCH).chunk(dist.get_world_size())[dist.get_rank()]
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        sends_more = engine.owner_steps.sends_more
        with count_traffic() as gathered:
            engine.owner_steps.gather(1.0)
        with count_traffic() as applied:
            engine.owner_steps.apply(number + 1, 1.0, 1.0)
        found.append((sends_more, gathered.payload, applied.payload))
    shapes = [layer.weight_shape for layer in engine.frozen.layers.values()]
    cases.release(engine)
    return shapes, found


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_bytes_are_what_trains_once_in_each_direction(stage):
    """And all factors where a round begins: of every weight before the first step, of k and v after the sixth."""

    def factors(of) -> int:
        """U, σ and V, the indices, and the count."""
        return sum(4 * (min(shape) * sum(shape) + min(shape)) + 8 * min(sst.R, *shape) + 8 for shape in of)

    for shapes, found in ranks(2).run(sent, stage):
        trained = 4 * sum(min(sst.R, *shape) * sum(shape) + min(shape) for shape in shapes)
        norms, rounds = 8 * len(shapes), {6: factors([shape for shape in shapes if min(shape) == 10])}
        compared = 6 * 8 * len(shapes)  # over the ranks, after the first step
        assert rounds[6] and found[0] == (True, trained + norms + factors(shapes), trained + compared)
        # The second step also tells what has had no gradient.
        assert found[2:] == [(n in rounds, trained + norms, trained + rounds.get(n, 0)) for n in range(3, 9)]


@pytest.mark.parametrize(
    ("family", "relora", "how", "said"),
    [
        ("llama", {}, {"weight_decay": 0.1}, "weight_decay: 0.1 is not supported with SST"),
        (
            "mixtral",
            {"target_parameters": ["experts.down_proj"]},
            {},
            "has a matrix for each expert, which SST does",
        ),
    ],
)
def test_what_it_does_not_go_with_is_refused_before_anything_is_built(family, relora, how, said):
    model = relora_ds.wrap(FAMILIES[family](), ReLoRAConfig(trains="none", **relora))
    with (
        mock.patch("relora_ds.zero.initialize.init_distributed", side_effect=AssertionError),
        pytest.raises(ValueError, match=said),
    ):
        relora_ds.initialize(model, "zero1", lr=1e-3, total_steps=9, matrix_optimizer=SST(4), **how)


def test_beside_other_rules_it_is_refused():
    model = relora_ds.wrap(FAMILIES["llama"](), ReLoRAConfig(trains="none"))
    first, *others = owned_layers(model)
    rules = {first: SST(4), **dict.fromkeys(others, Muon())}
    with pytest.raises(ValueError, match="SST, of which factors are sent, is for all layers or for none"):
        relora_ds.initialize(model, "zero1", lr=1e-3, total_steps=9, matrix_optimizer=rules, weight_decay=0.0)
