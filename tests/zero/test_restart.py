"""The invariants of a restart, at every stage and precision, on two ranks."""

import hashlib
import math

import pytest
import torch
import torch.distributed as dist

from relora_ds.lowrank.linear import initial_A
from relora_ds.lowrank.reinit import ROW_NORM, random_basis
from relora_ds.lowrank.wrap import lowrank_layers
from relora_ds.zero.collect import gather_factors
from tests.parity import cases
from tests.parity.reference import prune
from tests.ranks import ranks

STAGES = [0, 1, 2, 3]
FORMATS = ["bf16", "int8", "fp8", "nf4"]
BLOCKS = dict(hidden_size=32, intermediate_size=48)  # nf4 stores blocks of 64
# What one merge may change of the function, and lose of an update, on this small problem.
_DRIFT = {"nf4": 0.3, "fp8": 0.1}
_LOSS = {"nf4": 1.5, "fp8": 0.5}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def frozen_masters(engine) -> dict[str, torch.Tensor]:
    """Every fp32 master of a frozen weight, on every rank."""
    masters = {}
    for name, layer in lowrank_layers(engine.module).items():
        value = engine.frozen.read(name, engine.device)
        if value is None:
            value = torch.empty(layer.out_features, layer.in_features, device=engine.device)
        dist.broadcast(value, engine.frozen.owners[name])
        masters[name] = value.cpu()
    return masters


def fingerprint(*trees: dict) -> str:
    digest = hashlib.sha256()
    for tree in trees:
        for name in sorted(tree):
            value = tree[name]
            if isinstance(value, dict):
                digest.update(fingerprint(value).encode())
            else:
                digest.update(name.encode() + value.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def restart_by_hand(
    stage,
    precision,
    reset="magnitude_joint",
    after_evaluation=False,
    frozen_master="cpu",
    frozen_dtype="auto",
    frozen_placement="auto",
    double_quant=False,
    **how,
) -> dict:
    """Six steps, a restart by hand, and every invariant checked on this rank; returns what ranks must agree on."""
    relora = cases.relora_config(
        optimizer_reset=reset,
        frozen_master=frozen_master,
        frozen_dtype=frozen_dtype,
        frozen_placement=frozen_placement,
        frozen_double_quant=double_quant,
    )
    engine = cases.build(stage, precision=precision, relora=relora, **how)
    dtype = DTYPES[precision]
    rates = []
    for step in range(6):
        rates.append(engine.get_lr()[0])
        cases.train_step(engine, step)
    layers = lowrank_layers(engine.module)
    before, stored_before, masters_before = (
        cases.gathered_state(engine),
        cases.stored_weights(engine),
        frozen_masters(engine),
    )
    steps_before = engine.shards.adam_steps()
    probe = cases.batch(999, 4).to(engine.device)
    engine.drift_probe = lambda: engine.module(input_ids=probe).logits.clone()
    logits_before = cases.logits(engine)
    rho = float(engine.frozen.decay)
    assert rho == pytest.approx(math.prod(1 - lr * cases.DECAY for lr in rates), abs=1e-15) and rho < 0.9999
    if not after_evaluation:
        engine.empty_partition_cache()
    report = engine.restart()
    after, stored, masters = cases.gathered_state(engine), cases.stored_weights(engine), frozen_masters(engine)
    copies = cases.forward_copies(engine)
    logits_after = cases.logits(engine)

    # Merge.
    for name in layers:
        A, B = before["master"][f"{name}.lora_A"], before["master"][f"{name}.lora_B"]
        assert B.norm() > 1e-3, "nothing to merge: the test would show nothing"
        intended = rho * masters_before[name].double() + cases.SCALING * B.double() @ A.double()
        if frozen_master != "none":
            assert (masters[name] - intended).abs().max() <= 1e-6 * intended.abs().max()
            quantized = engine.frozen.quantize(masters[name].to(engine.device)).cpu()
            assert torch.equal(stored[name], quantized), f"{name}: stored copy is not the quantized master"
        elif frozen_dtype == "auto":
            assert (stored[name].double() - intended).abs().max() <= 2**-7 * intended.abs().max()
        else:
            W, B, A = (value.to(engine.device) for value in (masters_before[name], B, A))
            merged = W + torch.zeros_like(W).addmm_(B, A, alpha=cases.SCALING).add_(W, alpha=rho - 1)
            assert torch.equal(stored[name], engine.frozen.quantize(merged).cpu())
        assert not torch.equal(stored[name], stored_before[name])
    drift = ((logits_after - logits_before).norm() / logits_before.norm()).item()
    exact = precision == "fp32" and frozen_dtype in ("auto", "fp32")
    assert drift <= (5e-6 if exact else _DRIFT.get(frozen_dtype, 5e-2))
    assert report.merge_drift == pytest.approx(drift, rel=1e-3, abs=1e-7)
    assert report.merge_loss == report.merge_loss_total <= (1e-3 if exact else _LOSS.get(frozen_dtype, 0.5))
    assert report.merge_loss > 0

    # Reinitialise: masters and forward's copies.
    for name, layer in layers.items():
        A = initial_A(4, layer.in_features, seed=0, restart=1, name=name)
        assert torch.equal(after["master"][f"{name}.lora_A"], A)
        assert not after["master"][f"{name}.lora_B"].any()
    for name, value in after["master"].items():
        assert torch.equal(copies[name], value.to(dtype)), f"{name}: master and forward's copy differ"

    # Prune: LoRA moments as the whole-tensor reference does it, everything else untouched to the bit.
    pruned = kept = 0
    for name in after["master"]:
        m, v = before["exp_avg"][name].clone(), before["exp_avg_sq"][name].clone()
        if "lora_" in name:
            prune(m, v, reset, relora.reset_ratio)
            pruned += (after["exp_avg_sq"][name] == 0).sum().item()
            kept += (after["exp_avg_sq"][name] != 0).sum().item()
        else:
            assert torch.equal(after["master"][name], before["master"][name]), name
        assert torch.equal(after["exp_avg"][name], m) and torch.equal(after["exp_avg_sq"][name], v), name
    assert engine.shards.adam_steps() == steps_before == dict.fromkeys(steps_before, 6)
    expected = {"zero": 1.0, "none": 0.0}.get(reset, relora.reset_ratio)
    assert abs(report.prune_fraction_m - expected) < 2e-3 and abs(report.prune_fraction_v - expected) < 2e-3
    assert pruned / (pruned + kept) >= expected - 2e-3

    # The step after a restart has learning rate 0 and must change nothing: it exposes a stale master.
    assert engine.get_lr() == [0.0] * len(engine.get_lr())
    cases.train_step(engine, 6)
    later = cases.gathered_state(engine)
    assert fingerprint(later["master"]) == fingerprint(after["master"])
    assert fingerprint(cases.forward_copies(engine)) == fingerprint(copies)
    assert fingerprint(later["exp_avg"]) != fingerprint(after["exp_avg"])
    cases.train_step(engine, 7)
    cases.train_step(engine, 8)
    moved = cases.gathered_state(engine)["master"]
    assert all(moved[f"{name}.lora_B"].any() for name in layers), "B does not train after the restart"

    result = {
        "state": fingerprint(after, stored, masters, copies),
        "checksum": report.checksum,
        "report": (report.prune_fraction_m, report.merge_loss),
        "restarts": list(engine.restarts),
    }
    cases.release(engine)
    return result


def _check(results: list[dict]) -> None:
    assert all(result == results[0] for result in results), "the ranks disagree"
    assert results[0]["restarts"] == [6]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_invariants(stage, precision):
    _check(ranks(2).run(restart_by_hand, stage, precision))


@pytest.mark.parametrize("reset", ["magnitude", "zero", "none"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_reset(stage, reset):
    _check(ranks(2).run(restart_by_hand, stage, "fp32", reset=reset))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 3])
def test_with_the_optimizer_on_cpu(stage, precision):
    _check(ranks(2).run(restart_by_hand, stage, precision, offload=True))


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_directly_after_an_evaluation(stage):
    _check(ranks(2).run(restart_by_hand, stage, "bf16", after_evaluation=True))


@pytest.mark.parametrize("stage", [1, 3])
def test_persistent_small_parameters_and_none(stage):
    """ZeRO-3 keeps small parameters gathered, by default all of this model's; here none, and here all."""
    for threshold in (0, 10**6):
        _check(ranks(2).run(restart_by_hand, stage, "bf16", zero={"stage3_param_persistence_threshold": threshold}))


@pytest.mark.parametrize("stage", [1, 3])
def test_without_masters_bf16_is_rounded_without_bias(stage):
    _check(ranks(2).run(restart_by_hand, stage, "bf16", frozen_master="none"))


@pytest.mark.parametrize("frozen_dtype", FORMATS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_format(stage, frozen_dtype):
    _check(ranks(2).run(restart_by_hand, stage, "fp32", frozen_dtype=frozen_dtype, **BLOCKS))


@pytest.mark.parametrize("frozen_dtype", ["auto", *FORMATS])
def test_every_format_replicated_under_zero_3(frozen_dtype):
    _check(ranks(2).run(restart_by_hand, 3, "fp32", frozen_dtype=frozen_dtype, frozen_placement="replicated", **BLOCKS))


@pytest.mark.parametrize("frozen_dtype", ["fp32", "int8", "nf4"])
@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_formats_in_a_bf16_run(placement, frozen_dtype):
    for master in ("cpu", "device"):
        _check(
            ranks(2).run(
                restart_by_hand,
                3,
                "bf16",
                frozen_dtype=frozen_dtype,
                frozen_placement=placement,
                frozen_master=master,
                double_quant=frozen_dtype == "nf4",
                **BLOCKS,
            )
        )


@pytest.mark.parametrize("frozen_dtype", ["int8", "fp8", "nf4"])
@pytest.mark.parametrize("stage", [1, 3])
def test_formats_without_masters(stage, frozen_dtype):
    _check(ranks(2).run(restart_by_hand, stage, "fp32", frozen_dtype=frozen_dtype, frozen_master="none", **BLOCKS))


@pytest.mark.parametrize("family", ["gpt_neox", "qwen2"])
def test_other_model_families(family):
    for stage in (1, 3):
        _check(ranks(2).run(restart_by_hand, stage, "bf16", family=family))


@pytest.mark.parametrize("stage", [1, 3])
def test_three_ranks(stage):
    _check(ranks(3).run(restart_by_hand, stage, "bf16"))


def test_one_rank():
    for stage in STAGES:
        _check(ranks(1).run(restart_by_hand, stage, "fp32"))


def test_stage_1_with_fp32_accumulation_uses_another_wrapper():
    _check(ranks(2).run(restart_with_fp32_accumulation))


def restart_with_fp32_accumulation() -> dict:
    original = cases.ds_settings

    def with_fp32_accumulation(*args, **kwargs):
        return {**original(*args, **kwargs), "data_types": {"grad_accum_dtype": "fp32"}}

    cases.ds_settings = with_fp32_accumulation
    try:
        return restart_by_hand(1, "bf16")
    finally:
        cases.ds_settings = original


def random_pruning(stage) -> dict:
    engine = cases.build(stage, relora=cases.relora_config(optimizer_reset="random"))
    for step in range(3):
        cases.train_step(engine, step)
    engine.restart()
    moments = engine.shards.gather([n for n in engine.shards.names if "lora_" in n], "exp_avg_sq")
    cases.release(engine)
    return {n: (v != 0).nonzero().tolist() for n, v in moments.items()}


def test_random_pruning_draws_the_same_mask_at_every_stage():
    first, *others = [ranks(2).run(random_pruning, stage)[0] for stage in STAGES]
    assert all(len(kept) for name, kept in first.items() if "lora_B" in name)
    assert all(other == first for other in others)


def two_restarts_in_a_row() -> str:
    engine = cases.build(1)
    cases.train_step(engine, 0)
    engine.restart()
    try:
        engine.restart()
    except ValueError as error:
        return str(error)
    finally:
        cases.release(engine)
    return ""


def test_a_second_restart_at_the_same_step_is_an_error():
    assert "there was one at step t=1" in ranks(1).run(two_restarts_in_a_row)[0]


def a_rank_that_misses_a_weight(stage, precision) -> str:
    """Rank 1 throws away one broadcast weight; returns the error."""
    engine = cases.build(stage, precision=precision)
    cases.train_step(engine, 0)
    cases.train_step(engine, 1)
    publish, victim = engine.frozen.publish, next(iter(engine.frozen.layers))

    def forgetful(name, stored, device):
        if name != victim:
            return publish(name, stored, device)
        weight = engine.frozen.layers[name].weight
        piece = weight.ds_tensor if hasattr(weight, "ds_tensor") else weight
        before = piece.data.clone()
        publish(name, stored, device)
        if dist.get_rank() == 1:
            piece.data.copy_(before)
        return None

    engine.frozen.publish = forgetful
    try:
        engine.restart()
    except RuntimeError as error:
        return str(error)
    finally:
        cases.release(engine)
    return ""


@pytest.mark.parametrize("stage, precision", [(1, "fp32"), (1, "bf16"), (3, "fp32"), (3, "bf16")])
def test_ranks_that_disagree_are_noticed_by_all(stage, precision):
    for message in ranks(2).run(a_rank_that_misses_a_weight, stage, precision):
        assert "do not agree on model.layers.0.self_attn.q_proj.weight" in message


# -- other choices of A ----------------------------------------------------------------------------------------------


def restart_on_schedule(stage, accumulation=1, **relora) -> dict:
    """Train through the first scheduled restart; returns the new A's, and how much of the gradient each captures."""
    engine = cases.build(stage, relora=cases.relora_config(**relora), accumulation=accumulation)
    for step in range(cases.EVERY - 1):
        cases.train_step(engine, step)
        assert all(layer.sketch is None for layer in lowrank_layers(engine.module).values())
    gradients = full_gradients(engine.collect_merged(), cases.EVERY - 1)
    cases.train_step(engine, cases.EVERY - 1)
    assert engine.restarts == [cases.EVERY]
    layers, found, captured = lowrank_layers(engine.module), {}, []
    for name in layers:
        A = found[name] = gather_factors(engine.shards, engine.frozen, name, None)[0].cpu()
        basis = torch.linalg.qr(A.t()).Q
        best = torch.linalg.svd(gradients[name]).S[:4].square().sum()
        captured.append(((gradients[name] @ basis).square().sum() / best).item())
    cases.train_step(engine, cases.EVERY)
    lengths = {name: layer.row_norm**2 for name, layer in layers.items()}
    result = {
        "A": fingerprint(found),
        "captured": captured,
        "orthogonal": all(torch.allclose(A @ A.t(), torch.eye(4) * lengths[n], atol=1e-5) for n, A in found.items()),
        "values": {name: A.tolist() for name, A in found.items()},
    }
    cases.release(engine)
    return result


def full_gradients(weights, step) -> dict:
    """Of the merged weights, on the whole global batch, in one process."""
    model = cases.FAMILIES["llama"](0)
    model.load_state_dict(weights)
    tokens = cases.batch(step, cases.GLOBAL_BATCH)
    model(input_ids=tokens, labels=tokens).loss.backward()
    return {name: module.weight.grad for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}


@pytest.mark.parametrize(
    ("stage", "accumulation", "relora", "least"),
    [
        (0, 1, dict(restart_init="gradient"), 0.8),
        (1, 3, dict(restart_init="gradient"), 0.8),
        (3, 3, dict(restart_init="gradient"), 0.8),
        (2, 1, dict(restart_init="gradient", gradient_estimate="warm_sketch"), 0.8),
        (3, 1, dict(restart_init="gradient", gradient_estimate="warm_sketch", trains="B"), 0.8),
        (0, 3, dict(restart_init="gradient", gradient_estimate="exact"), 0.99999),
        (1, 3, dict(restart_init="gradient", gradient_estimate="exact", trains="B"), 0.99999),
        (3, 1, dict(restart_init="gradient", gradient_estimate="exact", trains="B"), 0.99999),
    ],
)
def test_a_begins_in_the_gradients_dominant_rows(stage, accumulation, relora, least):
    results = ranks(2).run(restart_on_schedule, stage, accumulation, **relora)
    assert results[0] == results[1] and results[0]["orthogonal"]
    assert sum(results[0]["captured"]) / len(results[0]["captured"]) > least


def test_kaimings_a_does_not_look_at_the_gradient():
    captured = ranks(2).run(restart_on_schedule, 1)[0]["captured"]
    assert sum(captured) / len(captured) < 0.5


@pytest.mark.parametrize(("stage", "trains"), [(1, "both"), (3, "B")])
def test_a_is_a_random_basis(stage, trains):
    results = ranks(2).run(restart_on_schedule, stage, restart_init="random", trains=trains)
    assert results[0] == results[1] and results[0]["orthogonal"]
    for name, A in results[0]["values"].items():
        expected = random_basis(torch.Size((4, len(A[0]))), f"0/1/{name}") * (1 if trains == "B" else ROW_NORM)
        torch.testing.assert_close(torch.tensor(A), expected)


def restart_by_hand_without_a_sketch() -> bool:
    engine = cases.build(1, relora=cases.relora_config(restart_init="gradient"))
    for step in range(3):
        cases.train_step(engine, step)
    engine.restart()
    masters = cases.gathered_state(engine)["master"]
    same = all(
        torch.equal(masters[f"{name}.lora_A"], initial_A(4, layer.in_features, seed=0, restart=1, name=name))
        for name, layer in lowrank_layers(engine.module).items()
    )
    cases.release(engine)
    return same


def test_a_restart_by_hand_has_no_gradient_to_choose_from():
    assert ranks(2).run(restart_by_hand_without_a_sketch) == [True, True]
