"""Steps of owners: what a skipped one changes, what a checkpoint has of them, what is sent, and what is refused."""

from unittest import mock

import pytest
import torch
import torch.distributed as dist

import relora_ds
from relora_ds.config import RecipeError, ReLoRAConfig, load_recipe
from relora_ds.matrix.muon_update import Muon
from relora_ds.zero.traffic import count_traffic
from tests.parity import cases, owner
from tests.ranks import ranks
from tests.small_models import FAMILIES
from tests.zero.restarts import BLOCKS, fingerprint
from tests.zero.test_nonfinite import bytes_of, everything, spoiled_step

SAVED_AT, END = 7, 12  # within an interval of the projection


def build(stage, name="fira", **how):
    return owner.build(stage, name, **{**BLOCKS, **how})


def train(engine, start: int, stop: int) -> list[float]:
    return [cases.train_step(engine, step) for step in range(start, stop)]


def all_of(engine) -> dict[str, str]:
    """One fingerprint for each kind of state; of the owners' on this rank."""
    held = {name: value.reshape(-1) for name, value in engine.owner_steps.held().items()}
    return {**everything(engine), "owners": fingerprint(held)}


# -- a step that is not taken ----------------------------------------------------------------------------------------


def spoiled(stage, precision, spoil) -> dict:
    engine = build(stage, precision=precision)
    train(engine, 0, 3)
    before = all_of(engine)
    spoiled_step(engine, spoil)
    after = all_of(engine)
    result = {"changed": [what for what in before if before[what] != after[what]], "applied": engine.was_step_applied()}
    result["losses"] = train(engine, 3, 6)
    cases.release(engine)
    return result


def undisturbed(stage, precision) -> list[float]:
    engine = build(stage, precision=precision)
    losses = train(engine, 0, 6)
    cases.release(engine)
    return losses[3:]


@pytest.mark.each_value_once
@pytest.mark.parametrize("spoil", ["nan", "inf"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing(stage, precision, spoil):
    expected = ranks(2).run(undisturbed, stage, precision)
    for rank, result in enumerate(ranks(2).run(spoiled, stage, precision, float(spoil))):
        assert (result["changed"], result["applied"]) == ([], False)
        assert result["losses"] == expected[rank]


def spoiled_owner(stage, precision) -> tuple[bool, list[str]]:
    """What only a gradient of a W has that is not finite."""
    engine = build(stage, precision=precision)
    train(engine, 0, 2)
    before = all_of(engine)
    tokens = cases.batch(5, cases.GLOBAL_BATCH).chunk(dist.get_world_size())[dist.get_rank()]
    if dist.get_rank() == 1:
        next(iter(engine.frozen.layers.values())).gradient_sum.values[0, 0] = float("nan")
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    engine.step()
    after = all_of(engine)
    applied = engine.was_step_applied()
    cases.release(engine)
    return applied, [what for what in before if before[what] != after[what]]


@pytest.mark.each_value_once
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_skips_what_owners_cannot_take(stage, precision):
    assert ranks(2).run(spoiled_owner, stage, precision) == [(False, [])] * 2


# -- clipping --------------------------------------------------------------------------------------------------------


def clipped(stage, precision, accumulate: str | None) -> tuple[float, float, float, str]:
    """What the optimizer that DeepSpeed wraps gets: this rank's sum of squares; then both norms, and the wrapper."""
    real = cases.ds_settings
    with mock.patch.object(
        cases,
        "ds_settings",
        lambda *given, **how: {
            **real(*given, **how),
            **({"data_types": {"grad_accum_dtype": accumulate}} if accumulate else {}),
        },
    ):
        engine = build(stage, "muon", precision=precision, clip=0.1)
    inner, seen = engine.shards._adapter.inner, []
    step = inner.step

    def spy(*given, **how):
        gradients = [p.grad for group in inner.param_groups for p in group["params"] if p.grad is not None]
        seen.append(sum(gradient.double().square().sum().item() for gradient in gradients))
        return step(*given, **how)

    inner.step = spy
    train(engine, 0, 1)
    result = sum(seen), float(engine.get_global_grad_norm()), engine.joint_norm.owners, type(engine.optimizer).__name__
    cases.release(engine)
    return result


@pytest.mark.parametrize(
    ("stage", "precision", "accumulate", "wrapper"),
    [
        (0, "bf16", None, "FP16_UnfusedOptimizer"),
        (1, "bf16", "fp32", "BF16_Optimizer"),
        (1, "bf16", None, "DeepSpeedZeroOptimizer"),
        (3, "bf16", None, "DeepSpeedZeroOptimizer_Stage3"),
    ],
)
def test_deepspeed_clips_by_the_norm_of_all(stage, precision, accumulate, wrapper):
    """Adam hardly depends on the length of a gradient, so that losses would not tell."""
    results = ranks(2).run(clipped, stage, precision, accumulate)
    squares = results[0][0] if stage == 0 else sum(square for square, *_ in results)
    for _, norm, owners, kind in results:
        assert kind == wrapper and 0 < owners < norm
        assert squares**0.5 == pytest.approx(0.1 * (norm**2 - owners**2) ** 0.5 / norm, rel=0.01)


# -- checkpoints -----------------------------------------------------------------------------------------------------


def whole(stage, name, precision, directory: str) -> dict:
    engine = build(stage, name, precision=precision)
    train(engine, 0, SAVED_AT)
    engine.save_checkpoint(directory)
    losses = train(engine, SAVED_AT, END)
    result = {"losses": losses, "end": all_of(engine), "weights": engine.collect_merged()}
    cases.release(engine)
    return result


def resumed(stage, name, precision, directory: str) -> dict:
    engine = build(stage, name, precision=precision, model_seed=1)
    engine.load_checkpoint(directory)
    losses = train(engine, SAVED_AT, END)
    result = {"losses": losses, "end": all_of(engine), "weights": engine.collect_merged()}
    cases.release(engine)
    return result


@pytest.mark.each_value_once
@pytest.mark.parametrize("name", ["fira", "apollo", "apollo_mini", "muon", "scale"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_resume_to_the_bit(stage, precision, name, tmp_path):
    how = (stage, name, precision, str(tmp_path))
    for one, other in zip(ranks(2).run(whole, *how), ranks(2).run(resumed, *how), strict=True):
        assert one["losses"] == other["losses"] and one["end"] == other["end"]


@pytest.mark.parametrize(("saved", "loaded"), [((1, 2), (3, 3)), pytest.param((3, 3), (0, 1), marks=pytest.mark.slow)])
def test_another_stage_and_number_of_ranks(saved, loaded, tmp_path):
    """(stage, ranks) each."""
    expected = ranks(saved[1]).run(whole, saved[0], "fira", "fp32", str(tmp_path))[0]
    found = ranks(loaded[1]).run(resumed, loaded[0], "fira", "fp32", str(tmp_path))[0]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    for name, weight in expected["weights"].items():
        assert (found["weights"][name] - weight).norm() <= 1e-4 * weight.norm(), name


def loads_another(directory: str) -> str:
    engine = build(1, "fira")
    train(engine, 0, 1)
    engine.save_checkpoint(directory)
    cases.release(engine)
    engine = build(1, "apollo")
    try:
        engine.load_checkpoint(directory)
    except ValueError as error:
        return str(error)
    finally:
        cases.release(engine)
    return "loaded"


def test_the_state_of_another_optimizer_is_refused(tmp_path):
    for said in ranks(2).run(loads_another, str(tmp_path)):
        assert "matrix_optimizer" in said and "Fira" in said and "Apollo" in said


# -- masters and bytes -----------------------------------------------------------------------------------------------


def stored_and_masters(stage, frozen_dtype) -> dict:
    engine = build(stage, "muon", precision="bf16", relora=owner.config(frozen_dtype=frozen_dtype))
    train(engine, 0, 4)
    frozen, stored = engine.frozen, cases.stored_weights(engine)
    for name in frozen.layers:
        if (master := frozen.read(name, engine.device)) is not None:
            assert master.dtype == torch.float32
            assert torch.equal(frozen.quantize(master).reshape(-1), stored[name].reshape(-1)), name
    result = {"stored": fingerprint(bytes_of(stored)), "masters": frozen.with_masters}
    cases.release(engine)
    return result


@pytest.mark.parametrize(("stage", "frozen_dtype"), [(1, "auto"), (3, "auto"), (2, "int8"), (3, "nf4")])
def test_what_forward_reads_is_the_rounded_master_on_all_ranks(stage, frozen_dtype):
    one, other = ranks(2).run(stored_and_masters, stage, frozen_dtype)
    assert one == other and one["masters"]


def sent(stage) -> tuple[int, int, int, int]:
    engine = build(stage, "muon", precision="bf16")
    tokens = cases.batch(0, cases.GLOBAL_BATCH).chunk(dist.get_world_size())[dist.get_rank()]
    engine.backward(engine(input_ids=tokens, labels=tokens).loss)
    owners = engine.owner_steps
    with count_traffic() as gathered:
        owners.gather(1.0)
    with count_traffic() as applied:
        owners.apply(1, 1.0, 1.0)
    elements = sum(layer.weight_shape.numel() for layer in engine.frozen.layers.values())
    num_layers = len(engine.frozen.layers)
    cases.release(engine)
    return elements, num_layers, gathered.payload, applied.payload


@pytest.mark.parametrize("stage", [1, 3])
def test_bytes_are_a_gradient_in_fp32_and_a_stored_copy(stage):
    for elements, num_layers, gathered, applied in ranks(2).run(sent, stage):
        assert applied == 2 * elements
        once = 4 * num_layers  # in the first step: how often each layer was called
        assert gathered == 4 * elements + 8 + once, "the gradients, and one number for the norm"


# -- what is refused -------------------------------------------------------------------------------------------------


class Unused(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model, self.unused, self.config = model, torch.nn.Linear(4, 4), model.config

    def forward(self, **inputs):
        return self.model(**inputs)


def with_an_unused_layer() -> str:
    model = relora_ds.wrap(Unused(FAMILIES["llama"]()), ReLoRAConfig(trains="none"))
    settings = cases.ds_settings(1, "fp32")
    engine, *_ = relora_ds.initialize(
        model, settings, lr=1e-3, total_steps=9, micro_batch_size=12, matrix_optimizer=Muon()
    )
    try:
        train(engine, 0, 3)
    except ValueError as error:
        return str(error)
    finally:
        cases.release(engine)
    return "trained"


def test_a_weight_that_no_gradient_reaches_is_an_error():
    for said in ranks(2).run(with_an_unused_layer):
        assert said.startswith("relora.target_modules: no gradient has reached unused in 2 steps")


@pytest.mark.parametrize(
    ("config", "given", "said"),
    [
        (ReLoRAConfig(trains="none"), None, "matrix_optimizer: not given"),
        (ReLoRAConfig(r=4), Muon(), "matrix_optimizer: given, but the model has no weights for it"),
        (ReLoRAConfig(trains="none"), {"nothing": Muon()}, "matrix_optimizer: nothing is no layer"),
    ],
)
def test_what_does_not_go_together_is_refused(config, given, said):
    model = relora_ds.wrap(FAMILIES["llama"](), config)
    with pytest.raises(ValueError, match=said):
        relora_ds.initialize(model, "zero1", lr=1e-3, total_steps=9, matrix_optimizer=given)


@pytest.mark.parametrize(
    ("config", "given", "said"),
    [
        (ReLoRAConfig(trains="none"), Muon(), "matrix_lr: -1.0 is not above 0"),
        (ReLoRAConfig(r=4), None, "matrix_lr: -1.0 has no effect without matrix_optimizer"),
    ],
)
def test_a_learning_rate_that_cannot_be_is_refused(config, given, said):
    model = relora_ds.wrap(FAMILIES["llama"](), config)
    with pytest.raises(ValueError, match=said):
        relora_ds.initialize(model, "zero1", lr=1e-3, total_steps=9, matrix_optimizer=given, matrix_lr=-1.0)


@pytest.mark.parametrize("method", ["relora", "lora", "galore", "full", "control"])
def test_a_recipe_names_the_method_instead(method):
    with pytest.raises(RecipeError, match="relora.trains: none is what the methods fira, .* and sst set"):
        load_recipe("tiny", [f"method={method}", "relora.trains=none", "relora.restart_every=null"])


@pytest.mark.parametrize("name", ["restart_every", "residual_every", "lora_dropout"])
def test_what_needs_factors_is_refused(name):
    with pytest.raises(ValueError, match=rf"ReLoRAConfig.{name}: .* has no factors to act on"):
        ReLoRAConfig(trains="none", **{name: 0.5 if name == "lora_dropout" else 10})
