"""Switches on ZeRO's shards: what they keep, what a skipped step changes, checkpoints, bytes, and what is refused."""

from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import relora_ds
from relora_ds.config.switch_config import SwitchLoRAConfig
from relora_ds.zero import switches
from relora_ds.zero.traffic import count_traffic
from tests.parity import cases, switching
from tests.parity.switching import build
from tests.ranks import ranks
from tests.small_models import FAMILIES
from tests.zero.restarts import fingerprint
from tests.zero.test_nonfinite import bytes_of, everything, spoiled_step

SAVED_AT, END = 7, 12


def train(engine, start: int, stop: int) -> list[float]:
    return [cases.train_step(engine, step) for step in range(start, stop)]


def all_of(engine) -> dict[str, str]:
    """One fingerprint for each kind of state; of the candidates on this rank."""
    held = {name: value.reshape(-1) for name, value in engine.switching.held().items()}
    return {**everything(engine), "owners": fingerprint(held), "resets": str(engine.switching._resets.tolist())}


def is_in_a_freeze(engine) -> bool:
    resets = engine.switching._resets
    return bool(((resets > 0) & (engine.t + 1 - resets <= switching.CONFIG.freeze_steps)).any())


# -- a switch --------------------------------------------------------------------------------------------------------


def switched(stage, precision) -> dict:
    engine = build(stage, precision=precision)
    seen = []
    real = engine.switching.after_step

    def spy(t):
        before, weights = cases.logits(engine), engine.collect_merged()
        counts = str(engine.switching._counts)
        real(t)
        after = engine.collect_merged()
        seen.append(
            {
                "took place": counts != str(engine.switching._counts),
                "logits": (cases.logits(engine) - before).abs().max().item(),
                "weights": max(((after[n] - w).norm() / w.norm()).item() for n, w in weights.items()),
            }
        )
        for name, master in cases.gathered_state(engine)["master"].items():
            copy = cases.forward_copies(engine)[name]
            assert torch.equal(copy, master.to(copy.dtype)), name

    engine.switching.after_step = spy
    train(engine, 0, 4)
    result = {"seen": seen, "stored": fingerprint(bytes_of(cases.stored_weights(engine)))}
    assert all(value.numel() * value.element_size() >= 4 * 20 * 20 for value in cases.stored_weights(engine).values())
    cases.release(engine)
    return result


@pytest.mark.each_value_once
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_switch_keeps_the_function_on_all_ranks(stage, precision):
    """In 16 bit W, A and B are rounded once each, where forward reads them; the fp32 values keep the function."""
    one, other = ranks(2).run(switched, stage, precision)
    assert one == other
    for step in one["seen"]:
        assert step["took place"] and step["weights"] <= 1e-6
        assert step["logits"] <= (1e-6 if precision == "fp32" else 0.02)


def with_another_bit() -> list[str]:
    said = []
    with mock.patch.object(switches, "VERIFIED_EVERY", 2):
        engine = build(1)
        train(engine, 0, 2)
        if dist.get_rank() == 1:
            next(iter(engine.frozen.layers.values())).weight.data[0, 0] += 1e-3
        try:
            train(engine, 2, 4)
        except RuntimeError as error:
            said.append(str(error))
    cases.release(engine)
    return said


def test_ranks_that_differ_are_noticed():
    for (said,) in ranks(2).run(with_another_bit):
        assert said.startswith("switches: the ranks do not agree on model.layers.0.")


# -- bytes -----------------------------------------------------------------------------------------------------------


def sent(stage) -> list[tuple[int, int]]:
    """By step: the bytes that a rank has sent, and those of the formula."""
    engine = build(stage)
    found = []
    real = engine.switching._switch
    turns = {}

    def spy(name, turn, *vectors):
        turns[name] = turn
        return real(name, turn, *vectors)

    engine.switching._switch = spy
    after_step = engine.switching.after_step

    def counted(t):
        turns.clear()
        with count_traffic() as traffic:
            after_step(t)
        numbers = 0
        for name, turn in turns.items():
            rows, columns = engine.frozen.layers[name].in_features, engine.frozen.layers[name].out_features
            numbers += len(turn.new_rows) * rows + len(turn.new_columns) * columns
            numbers += len(turn.pairs) * (rows + columns) if stage else 0
        assert engine.switching.last_exchange == traffic.payload
        found.append((traffic.payload, 4 * numbers))

    engine.switching.after_step = counted
    train(engine, 0, 3)
    cases.release(engine)
    return found


@pytest.mark.parametrize("stage", [0, 1, pytest.param(3, marks=pytest.mark.slow)])
def test_bytes_are_the_vectors_that_are_involved(stage):
    for steps in ranks(2).run(sent, stage):
        assert all(payload == expected > 0 for payload, expected in steps)


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


# -- checkpoints -----------------------------------------------------------------------------------------------------


def whole(stage, precision, directory: str) -> dict:
    engine = build(stage, precision=precision)
    train(engine, 0, SAVED_AT)
    assert is_in_a_freeze(engine)
    engine.save_checkpoint(directory)
    losses = train(engine, SAVED_AT, END)
    result = {"losses": losses, "end": all_of(engine), "weights": engine.collect_merged()}
    cases.release(engine)
    return result


def resumed(stage, precision, directory: str) -> dict:
    engine = build(stage, precision=precision, model_seed=1)
    train(engine, 0, 2)
    engine.load_checkpoint(directory)
    losses = train(engine, SAVED_AT, END)
    result = {"losses": losses, "end": all_of(engine), "weights": engine.collect_merged()}
    cases.release(engine)
    return result


@pytest.mark.each_value_once
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_resume_to_the_bit_within_a_freeze(stage, precision, tmp_path):
    how = (stage, precision, str(tmp_path))
    for one, other in zip(ranks(2).run(whole, *how), ranks(2).run(resumed, *how), strict=True):
        assert one["losses"] == other["losses"] and one["end"] == other["end"]


@pytest.mark.parametrize(("saved", "loaded"), [((1, 2), (3, 3)), pytest.param((3, 3), (0, 1), marks=pytest.mark.slow)])
def test_another_stage_and_number_of_ranks(saved, loaded, tmp_path):
    """(stage, ranks) each."""
    expected = ranks(saved[1]).run(whole, saved[0], "fp32", str(tmp_path))[0]
    found = ranks(loaded[1]).run(resumed, loaded[0], "fp32", str(tmp_path))[0]
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-5)
    assert found["end"]["resets"] == expected["end"]["resets"]
    for name, weight in expected["weights"].items():
        assert (found["weights"][name] - weight).norm() <= 1e-4 * weight.norm(), name


def loads_another(directory: str) -> str:
    engine = build(1)
    train(engine, 0, 1)
    engine.save_checkpoint(directory)
    cases.release(engine)
    engine = build(1, SwitchLoRAConfig(interval=7))
    try:
        engine.load_checkpoint(directory)
    except ValueError as error:
        return str(error)
    finally:
        cases.release(engine)
    return "loaded"


def test_other_settings_are_refused(tmp_path):
    for said in ranks(2).run(loads_another, str(tmp_path)):
        assert "switching was SwitchLoRAConfig(interval=5" in said and "is SwitchLoRAConfig(interval=7" in said


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("relora", "given", "said"),
    [
        ({"trains": "B", "restart_init": "random"}, {}, "relora.trains: B has no rows of A to switch"),
        ({"restart_every": 9, "restart_warmup_steps": 2}, {}, "relora.restart_every: 9 does not go with switching"),
        ({"lora_dropout": 0.1}, {}, "relora.lora_dropout: 0.1 does not go with switching"),
        ({"frozen_dtype": "bf16"}, {}, "relora.frozen_dtype: bf16 may round W"),
        ({"frozen_dtype": "int8"}, {}, "relora.frozen_dtype: int8 may round W"),
        ({"frozen_dtype": "auto"}, {}, "relora.frozen_dtype: auto may round W"),
        ({}, {"weight_decay": 0.1}, "weight_decay: 0.1 of B would have to act on W too"),
        ({}, {"optimizer": "adamw_8bit"}, "optimizer: adamw_8bit keeps no step count for each vector"),
        ({}, {"config": cases.ds_settings(1, "fp32", offload=True)}, "offload_optimizer does not go with switching"),
        ({}, {"islands": SimpleNamespace(problems=lambda relora: [])}, "islands: switches are not exchanged"),
        ({}, {"switching": SwitchLoRAConfig(interval=0)}, "switching.interval: 0 is not an integer"),
    ],
)
def test_what_does_not_go_together_is_refused(relora, given, said):
    model = relora_ds.wrap(FAMILIES["llama"](), switching.relora(**{"frozen_dtype": "fp32", **relora}))
    how = {"config": "zero1", "lr": 1e-3, "total_steps": 9, "precision": "fp32", "switching": switching.CONFIG, **given}
    with pytest.raises(ValueError, match=said):
        relora_ds.initialize(model, **how)


def test_experts_are_refused():
    relora = switching.relora(target_parameters=["experts.gate_up_proj", "experts.down_proj"], frozen_dtype="fp32")
    model = relora_ds.wrap(FAMILIES["mixtral"](), relora)
    with pytest.raises(ValueError, match="relora.target_parameters: .*experts.* has experts in one parameter"):
        relora_ds.initialize(model, "zero1", lr=1e-3, total_steps=9, switching=switching.CONFIG)


def on_three_ranks() -> str:
    try:
        build(3, precision="bf16")
    except ValueError as error:
        return str(error)
    return "built"


@pytest.mark.slow
def test_pieces_that_cut_a_number_are_refused():
    for said in ranks(3).run(on_three_ranks):
        assert said.startswith("relora.frozen_placement: auto cuts model.layers.0.")


def restarts() -> str:
    engine = build(1)
    train(engine, 0, 1)
    try:
        engine.restart()
    except ValueError as error:
        return str(error)
    finally:
        cases.release(engine)
    return "restarted"


def test_a_restart_by_hand_is_refused():
    assert ranks(1).run(restarts)[0].startswith("restart: vectors of A and B are switched one by one")
