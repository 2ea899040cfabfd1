"""A restart by hand, with every invariant checked on each rank."""

import hashlib
import math

import pytest
import torch
import torch.distributed as dist

from relora_ds.lowrank.linear import initial_A
from relora_ds.lowrank.wrap import lowrank_layers
from tests.parity import cases
from tests.parity.reference import prune

STAGES = [0, 1, 2, 3]
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
    """Hash names and values, also of trees in trees."""
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


def check(results: list[dict]) -> None:
    """Check the results of `restart_by_hand` on all ranks."""
    assert all(result == results[0] for result in results), "the ranks disagree"
    assert results[0]["restarts"] == [6]
