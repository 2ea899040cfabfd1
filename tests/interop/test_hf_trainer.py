"""`ReLoRATrainer` and `ReLoRACallback`: our own engine's losses, exact resume, whole models on disk."""

import functools

import pytest
import torch
import torch.distributed as dist

import relora_ds
from tests.interop.trainers import (
    EVALS,
    LR,
    MICRO,
    MICROS,
    MIN_RATIO,
    SAVED_AT,
    STEPS,
    TRAIN_ROWS,
    WARMUP,
    network,
    plain_loss,
    relora_config,
    trainers_run,
)
from tests.parity import cases
from tests.ranks import ranks
from tests.small_models import batch
from tests.zero.restarts import fingerprint


def micro_steps(accumulation: int) -> list[list[int]]:
    """The micro-batches of every optimizer step, by their number in the epoch."""
    epoch = [list(range(i, min(i + accumulation, MICROS))) for i in range(0, MICROS, accumulation)]
    return [epoch[step % len(epoch)] for step in range(STEPS)]


def our_run(
    directory: str, stage: int, precision: str, accumulation: int, lora_dropout: float, frozen: dict | None
) -> dict:
    """The same run in a loop of our own. The loss is summed, and divided by all labels, as the Trainer does.

    Also saved where the Trainer is: within a period of residual updates that decides in which order its sums are added.
    """
    config = relora_config(lora_dropout=lora_dropout, **(frozen or {}))
    engine, *_ = relora_ds.initialize(
        model=relora_ds.wrap(network(0, frozen), config),
        config=f"zero{stage}",
        lr=LR,
        total_steps=STEPS,
        warmup_steps=WARMUP,
        min_lr_ratio=MIN_RATIO,
        weight_decay=cases.DECAY,
        max_grad_norm=cases.CLIP,
        precision=precision,
        micro_batch_size=MICRO,
        gradient_accumulation_steps=accumulation,
    )
    world_size, losses, lr = dist.get_world_size(), [], []
    for numbers in micro_steps(accumulation):
        lr.append(engine.get_lr()[0])
        num_labels = len(numbers) * world_size * MICRO * (TRAIN_ROWS.shape[1] - 1)
        for number in numbers:
            mine = TRAIN_ROWS.split(MICRO)[number * world_size + dist.get_rank()]
            loss = engine(input_ids=mine, labels=mine, num_items_in_batch=torch.tensor(num_labels)).loss * world_size
            engine.set_gradient_accumulation_boundary(number == numbers[-1])
            engine.backward(loss, scale_wrt_gas=False)
            engine.step()
            losses.append(loss.item())
        if engine.t == SAVED_AT:
            engine.save_checkpoint(directory)
    weights = fingerprint(engine.collect_merged())
    found = {"losses": losses, "restarts": list(engine.restarts), "lr": lr, "weights": weights}
    cases.release(engine)
    return found


@functools.cache
def num_before(step: int, accumulation: int) -> int:
    """Micro-steps before an optimizer step."""
    return sum(len(numbers) for numbers in micro_steps(accumulation)[:step])


INT8, NF4 = {"frozen_dtype": "int8"}, {"frozen_dtype": "nf4"}
ONE_SIDED = {"trains": "B", "restart_init": "gradient", "gradient_estimate": "warm_sketch", "optimizer_reset": "rotate"}
# `method: galore` of a recipe; the steps of an epoch have 3, 3 and 1 micro-batches.
GALORE = {
    "trains": "B",
    "restart_init": "gradient",
    "gradient_estimate": "exact",
    "optimizer_reset": "none",
    "restart_warmup_steps": 0,
}
RESIDUAL = {**GALORE, "residual_every": 2}  # a checkpoint is within a period


@pytest.mark.parametrize(
    ("kind", "stage", "precision", "accumulation", "lora_dropout", "frozen"),
    [
        ("callback", 0, "fp32", 1, 0.0, None),
        ("subclass", 1, "fp32", 2, 0.3, None),
        ("callback", 2, "fp32", 3, 0.0, RESIDUAL),
        ("subclass", 3, "fp32", 1, 0.0, NF4),
        *(
            pytest.param(*how, marks=pytest.mark.slow)
            for how in [
                ("callback", 1, "bf16", 1, 0.0, INT8),
                ("callback", 0, "fp32", 2, 0.0, None),
                ("callback", 2, "fp32", 1, 0.0, None),
                ("callback", 3, "fp32", 2, 0.0, None),
                ("callback", 1, "bf16", 1, 0.0, None),
                ("subclass", 3, "bf16", 1, 0.0, None),
                ("subclass", 3, "bf16", 1, 0.0, ONE_SIDED),
                *(("callback", stage, "fp32", 3, 0.0, GALORE) for stage in (1, 2, 3)),
                *(("subclass", stage, "fp32", 3, 0.0, RESIDUAL) for stage in (1, 3)),
                ("callback", 2, "fp32", 2, 0.0, ONE_SIDED),
                ("subclass", 1, "fp32", 2, 0.0, {**ONE_SIDED, "residual_every": 1}),
                ("callback", 1, "fp32", 1, 0.0, None),
                ("callback", 2, "fp32", 2, 0.0, None),
                ("callback", 3, "fp32", 1, 0.0, None),
                ("callback", 0, "bf16", 1, 0.0, None),
                ("callback", 2, "bf16", 2, 0.0, None),
                ("callback", 0, "fp32", 1, 0.0, NF4),
                ("callback", 2, "fp32", 2, 0.3, INT8),
                ("callback", 3, "fp32", 1, 0.0, {**INT8, "frozen_placement": "replicated"}),
            ]
        ),
    ],
)
def test_losses_resume_and_models(tmp_path, kind, stage, precision, accumulation, lora_dropout, frozen):
    how = dict(stage=stage, precision=precision, accumulation=accumulation, lora_dropout=lora_dropout, frozen=frozen)
    whole = ranks(2).run(trainers_run, str(tmp_path), again=True, save=str(tmp_path / "merged"), kind=kind, **how)
    ours = ranks(2).run(our_run, str(tmp_path / "ours"), **how)
    resumed = ranks(2).run(trainers_run, str(tmp_path), resume=SAVED_AT, model_seed=1, kind=kind, **how)
    for rank in range(2):
        (run, same_trainer), [new_process] = whole[rank], resumed[rank]
        assert run["restarts"] == ours[rank]["restarts"] == [4, 8, 12] and run["t"] == STEPS
        assert run["losses"] == ours[rank]["losses"] and run["weights"] == ours[rank]["weights"]
        assert run["lr"] == pytest.approx(ours[rank]["lr"], rel=1e-12)
        assert [(entry["step"], entry["restarts"]) for entry in run["reports"]] == [(4, 1), (8, 2), (12, 3)]
        rest = run["losses"][num_before(SAVED_AT, accumulation) :]
        for again in (same_trainer, new_process):
            assert again["losses"] == rest and again["weights"] == run["weights"]
            assert again["restarts"] == run["restarts"]
            assert again["eval"] == run["eval"] and tuple(again["eval"]) == EVALS
    # The plain model is fp32, from masters; the engine evaluates in bf16, or on what is stored.
    tolerance = 1e-6 if precision == "fp32" and frozen is None else 2e-3
    assert plain_loss(tmp_path / f"checkpoint-{SAVED_AT}") == pytest.approx(run["eval"][SAVED_AT], rel=tolerance)
    assert plain_loss(tmp_path / "merged") == pytest.approx(run["eval"][STEPS], rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["subclass", "callback"])
def test_a_run_goes_on_at_another_stage_on_other_ranks(tmp_path, kind):
    """The same 6 rows a step. Saved after the second restart of three, and the third one follows the resume."""
    how = dict(directory=str(tmp_path), kind=kind, data=batch(0, 6 * MICROS))
    whole = [run for [run] in ranks(2).run(trainers_run, stage=1, per_device_train_batch_size=3, **how)]
    assert whole[0]["restarts"] == [4, 8, 12]
    assert relora_ds.load_run(tmp_path / f"checkpoint-{SAVED_AT}").step == SAVED_AT
    for world_size in (1, 3):
        resumed = ranks(world_size).run(
            trainers_run, stage=3, per_device_train_batch_size=6 // world_size, resume=SAVED_AT, model_seed=1, **how
        )
        resumed = [run for [run] in resumed]
        assert all(run["restarts"] == [4, 8, 12] and run["t"] == STEPS for run in resumed)
        assert sorted(resumed[0]["eval"]) == list(EVALS)
        assert global_losses(resumed) == pytest.approx(global_losses(whole)[SAVED_AT:], rel=1e-4)
        assert resumed[0]["eval"] == pytest.approx(whole[0]["eval"], rel=1e-4)
        assert resumed[0]["lr"] == pytest.approx(whole[0]["lr"], rel=1e-12)


def global_losses(runs: list[dict]) -> list[float]:
    """Of every step, from the parts of all ranks."""
    return [sum(parts) / len(parts) for parts in zip(*(run["losses"] for run in runs), strict=True)]
