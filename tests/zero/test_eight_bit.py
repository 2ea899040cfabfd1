"""AdamW with moments in 8 bit, by bitsandbytes, at every ZeRO stage: bytes, losses, restarts, resumes."""

import pytest
import torch

import relora_ds
from relora_ds.zero.moment_codes import BLOCK
from relora_ds.zero.moments import max_update_over_lr, prune_moments
from relora_ds.zero.optimizers import moment_bytes
from tests.cuda.gpus import needs
from tests.parity import cases
from tests.parity.reference import prune
from tests.ranks import ranks
from tests.small_models import llama

pytestmark = needs("bitsandbytes")

# Matrices of more than 4096 elements, below which bitsandbytes keeps fp32; tensors and ranks end within blocks.
SIZES = {"vocab_size": 127, "hidden_size": 72, "intermediate_size": 101, "num_hidden_layers": 2}
EVERY, SAVED_AT, END = 3, 3, 8


def build(stage, precision="fp32", optimizer="adamw_8bit", relora=None, **how):
    relora = cases.relora_config(**{"r": 64, "restart_every": EVERY, "restart_warmup_steps": 2, **(relora or {})})
    return cases.build(stage, precision=precision, relora=relora, optimizer=optimizer, lr=2e-3, **SIZES, **how)


def state_bytes(engine) -> tuple[int, int]:
    """Bytes of this rank's moments, and what they should have: 2 an element and a scale a block, but for embeddings."""
    held = expected = 0
    inner = engine.shards._adapter.inner
    for group, flat in engine.shards._adapter.flats():
        state = inner.state[flat]
        held += sum(state[key].nbytes for key in ("state1", "state2", "absmax1", "absmax2") if key in state)
        bits = inner.param_groups[group]["optim_bits"]
        expected += 8 * flat.numel() if bits == 32 else moment_bytes(flat.numel())
    return held, expected


def run(stage, precision, directory: str, **how) -> dict:
    """Through a restart, which is looked at; saved right after it; on to the next; loaded into a trained engine."""
    engine = build(stage, precision, **how)
    seen = {}

    def after_step(engine):
        if engine.lr_scheduler.restart_due and "before" not in seen:
            seen["before"] = cases.gathered_state(engine)
            engine.restart()
            seen["after"] = cases.gathered_state(engine)
        else:
            engine.restart_if_due()

    engine.after_step = after_step
    losses = [cases.train_step(engine, step) for step in range(SAVED_AT)]
    engine.save_checkpoint(directory)
    losses += [cases.train_step(engine, step) for step in range(SAVED_AT, END)]
    end = cases.gathered_state(engine)
    held, expected = state_bytes(engine)
    matrices = [shard for shard in engine.shards if shard.numel > 72 and shard.exp_avg.numel()]
    in_fp32 = {shard.name: shard.exp_avg.is_view for shard in matrices}
    cases.release(engine)
    resumed, other = resume(stage, precision, directory, **how)
    return {
        "bytes": (held, expected),
        "in fp32": in_fp32,
        "losses": losses,
        "pruned": pruned_exactly(seen["before"], seen["after"]),
        "resumed": resumed == losses[SAVED_AT:] and all(same(end[what], other[what]) for what in end),
    }


def resume(stage, precision, directory: str, **how) -> tuple[list[float], dict]:
    engine = build(stage, precision, model_seed=1, **how)
    cases.train_step(engine, 100)  # moments of its own, which must not be in the way
    engine.load_checkpoint(directory)
    losses = [cases.train_step(engine, step) for step in range(SAVED_AT, END)]
    state = cases.gathered_state(engine)
    cases.release(engine)
    return losses, state


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def pruned_exactly(before: dict, after: dict) -> bool:
    """Kept moments are the same bits; where the second one is 0, the first one is not kept either."""
    kept = 0
    for name in before["exp_avg"]:
        m, v = before["exp_avg"][name].clone(), before["exp_avg_sq"][name].clone()
        if "lora_" in name:
            prune(m, v, "magnitude_joint", 0.9)
            m *= v > 0
        if not (torch.equal(after["exp_avg"][name], m) and torch.equal(after["exp_avg_sq"][name], v)):
            return False
        kept += (m != 0).sum().item()
    return kept > 0


@pytest.mark.each_value_once
@pytest.mark.parametrize(
    "stage, precision, how",
    [
        (0, "fp32", {}),
        pytest.param(0, "bf16", {}, marks=pytest.mark.slow),
        (1, "bf16", {}),
        pytest.param(2, "fp32", {}, marks=pytest.mark.slow),
        (3, "fp32", {}),
        (3, "bf16", {"zero": {"offload_optimizer": {"device": "cpu"}}}),
    ],
)
def test_bytes_restart_and_resume(stage, precision, how, tmp_path):
    for result in ranks(2).run(run, stage, precision, str(tmp_path), **how):
        assert result["in fp32"] == {name: "embed" in name for name in result["in fp32"]}
        held, expected = result["bytes"]
        assert held == expected
        assert result["pruned"]
        assert result["resumed"], "not to the bit"


def prune_where_the_second_moment_is_rounded_away(how: str) -> tuple[float, int]:
    engine = build(0)
    names = [name for name in engine.shards.names if "lora_" in name]
    for name in names:
        shard = engine.shards[name]
        first = torch.arange(shard.numel) % 2 == 0  # of each pair: a square that is too small beside the other's
        shard.exp_avg.write(torch.where(first, 1e-3, 1.0))
        shard.exp_avg_sq.write(torch.where(first, 1e-9, 1.0))
        assert not shard.exp_avg_sq.read()[first].any() and shard.exp_avg.read()[first].all()
    engine.shards.set_adam_steps({"lora": 1, "lora_A": 1})
    largest = max_update_over_lr(engine.shards, names, eps=1e-8, device=engine.device)
    prune_moments(engine.shards, names, how, 0.0, seed=0, number=1, device=engine.device)
    kept = sum(int((shard.exp_avg.read() != 0).sum()) for shard in map(engine.shards.__getitem__, names))
    total = sum(engine.shards[name].numel for name in names)
    cases.release(engine)
    return largest, kept / total


@pytest.mark.parametrize(("how", "kept"), [("none", 0.5), ("magnitude_joint", 0.5), ("magnitude", 1.0)])
def test_no_moment_survives_a_restart_without_its_square(how, kept):
    """Else the step after it, without a gradient, is exp_avg / eps long. `magnitude` is the authors', as it is."""
    [(largest, found)] = ranks(1).run(prune_where_the_second_moment_is_rounded_away, how)
    assert found == kept
    assert largest < 10  # what is rounded to 0 after a step does not count as its size


NEAR = 2e-4  # relative; moments that lose their sign, scale or a tenth of their size are beyond 1e-2


def train(stage, optimizer, steps=24, relora=None) -> list[float]:
    engine = build(stage, optimizer=optimizer, relora=relora)
    losses = [cases.train_step(engine, step) for step in range(steps)]
    cases.release(engine)
    return losses


@pytest.mark.slow
def test_losses_are_near_those_of_adamw_and_of_other_cuts():
    """Through seven restarts. On one rank, and at stage 3, blocks begin elsewhere: not the same bits, but as near."""
    plain = ranks(2).run(train, 1, "adamw")[0]
    for world, stage in ((2, 1), (1, 1), (2, 3)):
        losses = ranks(world).run(train, stage, "adamw_8bit")[0]
        assert losses != plain
        assert losses == pytest.approx(plain, rel=NEAR)


def test_moments_of_a_one_sided_chain_are_rotated():
    relora = {"trains": "B", "restart_init": "gradient", "optimizer_reset": "rotate", "restart_warmup_steps": 0}
    plain, short = (ranks(2).run(train, 1, name, 12, relora)[0] for name in ("adamw", "adamw_8bit"))
    assert short != plain
    assert short == pytest.approx(plain, rel=NEAR)


GALORE = {"trains": "B", "restart_init": "gradient", "optimizer_reset": "none"}


def memorised(optimizer: str, reset: str | None) -> list[float]:
    """Sixty steps on two batches, in GaLore's chain or, without a reset, at full rank as in a warm start."""
    model = llama(**SIZES)
    if reset is not None:
        chain = {**GALORE, "optimizer_reset": reset, "restart_every": 10, "restart_warmup_steps": 0}
        model = relora_ds.wrap(model, cases.relora_config(r=64, lora_alpha=64, **chain))
    schedule = {"lr": 2e-3, "total_steps": 60, "warmup_steps": 4, "min_lr_ratio": 0.1}
    how = {"optimizer": optimizer, "precision": "fp32", "micro_batch_size": 12}
    engine, *_ = relora_ds.initialize(model, cases.ds_settings(1, "fp32"), **schedule, **how)
    losses = [cases.train_step(engine, step % 2) for step in range(60)]
    cases.release(engine)
    return losses


@pytest.mark.slow
@pytest.mark.parametrize("reset", ["none", None])
def test_a_chain_and_full_rank_memorise_as_with_adamw(reset):
    """They differ by 2 %, as after a learning rate that is 1 % higher; moments that restarts lose make 14 %."""
    plain, short = (ranks(2).run(memorised, name, reset)[0] for name in ("adamw", "adamw_8bit"))
    assert short != plain and plain[-1] < 0.5 * plain[0]
    assert short == pytest.approx(plain, rel=0.04)
    if reset is not None:
        lost = ranks(2).run(memorised, "adamw", "zero")[0]
        assert max(abs(a - b) / b for a, b in zip(lost, plain, strict=True)) > 0.1


def save(stage, optimizer, directory: str) -> dict:
    engine = build(stage, optimizer=optimizer)
    for step in range(SAVED_AT - 1):
        cases.train_step(engine, step)
    engine.save_checkpoint(directory)
    state = cases.gathered_state(engine)
    cases.release(engine)
    return state


def load(stage, optimizer, directory: str) -> tuple[dict, dict, float]:
    engine = build(stage, optimizer=optimizer, model_seed=1)
    engine.load_checkpoint(directory)
    state, steps = cases.gathered_state(engine), engine.shards.adam_steps()
    loss = cases.train_step(engine, SAVED_AT - 1)
    cases.release(engine)
    return state, steps, loss


@pytest.mark.parametrize(
    "saved, loaded, exact",
    [
        ((2, 1, "adamw_8bit"), (1, 3, "adamw"), True),
        ((2, 2, "adamw"), (2, 0, "adamw_8bit"), False),
        ((2, 3, "adamw_8bit"), (1, 1, "adamw_8bit"), False),
    ],
)
def test_checkpoints_move_between_optimizers_ranks_and_stages(saved, loaded, exact, tmp_path):
    world, *how = saved
    before = ranks(world).run(save, *how, str(tmp_path))[0]
    world, *how = loaded
    after, steps, loss = ranks(world).run(load, *how, str(tmp_path))[0]
    assert loss < 5 and steps == dict.fromkeys(steps, SAVED_AT - 1)
    assert same(before["master"], after["master"])
    for what in ("exp_avg", "exp_avg_sq"):
        for name, old in before[what].items():
            old, new = old.view(-1), after[what][name].view(-1)
            if exact:
                assert torch.equal(old, new), f"{what} of {name}"
            elif (inner := old[BLOCK:-BLOCK]).numel():  # at the ends, a block's scale may be a neighbour's
                error = (new[BLOCK:-BLOCK] - inner).abs().max()
                assert error <= 0.01 * inner.abs().max(), f"{what} of {name}"


def from_the_type_in_the_config() -> str:
    model = relora_ds.wrap(llama(), cases.relora_config())
    config = {"zero_optimization": {"stage": 1}, "optimizer": {"type": "AdamW8bit", "params": {"lr": 1e-3}}}
    engine, *_ = relora_ds.initialize(model, config, total_steps=12)
    found = type(engine.shards._adapter.inner).__mro__[1].__module__
    cases.release(engine)
    return found


def test_the_type_in_a_deepspeed_configuration_counts():
    assert ranks(1).run(from_the_type_in_the_config) == ["bitsandbytes.optim.adamw"]
