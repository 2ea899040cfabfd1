"""`ReLoRATrainer` and `ReLoRACallback`: our own engine's losses, exact resume, whole models on disk."""

import contextlib
import functools
import itertools
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    get_scheduler,
)

import relora_ds
from relora_ds import ReLoRACallback, ReLoRATrainer, lr_multiplier
from relora_ds.interop.hf_checks import curve_of
from tests.parity import cases
from tests.ranks import ranks
from tests.small_models import batch, llama

MICRO, MICROS = 2, 7  # rows of a micro-batch; micro-batches of an epoch on each of two ranks: odd, so accumulation
# by 2 ends the epoch with a step of one micro-batch
EVERY, REWARM, SAVED_AT, STEPS, WARMUP, LR, MIN_RATIO = 4, 2, 9, 14, 3, 1e-2, 0.1  # restarts after 4, 8 and 12
EVALS = (3, 6, 9, 12, 14)  # 12 is directly after a restart, 14 the end
TRAIN_ROWS, EVAL_ROWS = batch(0, 2 * MICRO * MICROS), batch(777, 8)


class Recording:
    """A user's methods: they keep loss and rows of every training micro-step, and spoil one where they are told to."""

    spoiled_step = None

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.model.training:
            self.rows.append(inputs["input_ids"].tolist())
            if self.state.global_step == self.spoiled_step and dist.get_rank() == 1:
                loss = loss * float("nan")
            self.losses.append(loss.item())
        return loss


class RecordingTrainer(Recording, Trainer):
    """A user's trainer, which gets the callback."""


class RecordingReLoRATrainer(Recording, ReLoRATrainer):
    """The same, on ours."""


CLASSES = {"callback": RecordingTrainer, "subclass": RecordingReLoRATrainer, "nothing": RecordingTrainer}


def rows(tokens: torch.Tensor) -> list[dict]:
    return [{"input_ids": row, "labels": row} for row in tokens]


def network(seed: int, frozen: dict | None):
    return llama(seed, hidden_size=32, intermediate_size=48) if frozen else llama(seed)  # nf4 stores blocks of 64


def relora_config(**changes):
    return cases.relora_config(restart_every=EVERY, restart_warmup_steps=REWARM, **changes)


@contextlib.contextmanager
def made_trainer(
    directory: str,
    stage: int,
    precision: str = "fp32",
    accumulation: int = 1,
    model_seed: int = 0,
    lora_dropout: float = 0.0,
    frozen: dict | None = None,
    kind: str = "callback",
    load: str | None = None,
    data: torch.Tensor = TRAIN_ROWS,
    **changes,
):
    """A trainer on a new wrapped model; afterwards, no trace of it in the process.

    kind: with ReLoRA by "callback" or "subclass", or "nothing" of it.
    load: a directory that the model is loaded from when there are TrainingArguments.
    """
    config = relora_config(lora_dropout=lora_dropout, **(frozen or {}))
    model = relora_ds.wrap(network(model_seed, frozen), config, seed=model_seed) if load is None else None
    trainer = None
    try:
        arguments = TrainingArguments(
            **{
                **dict(
                    output_dir=directory,
                    deepspeed=str(Path("ds_configs", f"zero{stage}.json")),
                    use_cpu=True,
                    bf16=precision == "bf16",
                    seed=0,
                    learning_rate=LR,
                    lr_scheduler_type="cosine_with_min_lr",
                    lr_scheduler_kwargs={"min_lr_rate": MIN_RATIO},
                    warmup_steps=WARMUP,
                    max_steps=STEPS,
                    weight_decay=cases.DECAY,
                    max_grad_norm=cases.CLIP,
                    per_device_train_batch_size=MICRO,
                    gradient_accumulation_steps=accumulation,
                    train_sampling_strategy="sequential",
                    save_steps=SAVED_AT,
                    eval_strategy="steps",
                    eval_steps=3,
                    per_device_eval_batch_size=MICRO,
                    logging_steps=1,
                    disable_tqdm=True,
                    report_to="none",
                    log_level="error",
                ),
                **changes,
            }
        )
        torch.set_num_threads(1)  # accelerate has changed it
        if load is not None:
            model = relora_ds.wrap(AutoModelForCausalLM.from_pretrained(load, attn_implementation="eager"), config)
            assert hasattr(model.lm_head.weight, "ds_tensor") == (stage == 3)
        trainer = CLASSES[kind](model=model, args=arguments, train_dataset=rows(data), eval_dataset=rows(EVAL_ROWS))
        trainer.losses, trainer.rows = [], []
        trainer.remove_callback(PrinterCallback)
        if kind == "callback":
            trainer.add_callback(ReLoRACallback(trainer))
        yield trainer
    finally:
        if isinstance(getattr(trainer, "model_wrapped", None), relora_ds.ReLoRAEngine):
            cases.release(trainer.model_wrapped)
        forget_accelerate()


def forget_accelerate() -> None:
    from accelerate.state import AcceleratorState, GradientState
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    unset_hf_deepspeed_config()
    os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def summary(trainer) -> dict:
    history = trainer.state.log_history
    return {
        "losses": trainer.losses,
        "rows": trainer.rows,
        "restarts": list(trainer.model_wrapped.restarts),
        "t": trainer.model_wrapped.t,
        "lr": [entry["learning_rate"] for entry in history if "learning_rate" in entry],
        "eval": {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry},
        "reports": [entry for entry in history if "restarts" in entry],
    }


def trainers_run(
    directory: str, *, resume: int | None = None, again: bool = False, save: str | None = None, **how
) -> list[dict]:
    """A run; with `again`, a second one of the same trainer, from the middle."""
    with made_trainer(directory, **how) as trainer:
        trainer.train(resume_from_checkpoint=f"{directory}/checkpoint-{resume}" if resume else None)
        found = [summary(trainer)]
        if save:
            trainer.save_model(save)
        if again:
            trainer.losses, trainer.rows = [], []
            trainer.train(resume_from_checkpoint=f"{directory}/checkpoint-{SAVED_AT}")
            found.append(summary(trainer))
    return found


def micro_steps(accumulation: int) -> list[list[int]]:
    """The micro-batches of every optimizer step, by their number in the epoch."""
    epoch = [list(range(i, min(i + accumulation, MICROS))) for i in range(0, MICROS, accumulation)]
    return [epoch[step % len(epoch)] for step in range(STEPS)]


def our_run(stage: int, precision: str, accumulation: int, lora_dropout: float, frozen: dict | None) -> dict:
    """The same run in a loop of our own. The loss is summed, and divided by all labels, as the Trainer does."""
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
    found = {"losses": losses, "restarts": list(engine.restarts), "lr": lr}
    cases.release(engine)
    return found


def plain_loss(directory: Path) -> float:
    """The evaluation loss of the model that `from_pretrained` finds there; nothing in it may be low-rank."""
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if "lora" in name]  # noqa: SIM118 (not a dict)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    assert model.dtype == torch.float32
    with torch.no_grad():
        return model(input_ids=EVAL_ROWS, labels=EVAL_ROWS).loss.item()


@functools.cache
def num_before(step: int, accumulation: int) -> int:
    """Micro-steps before an optimizer step."""
    return sum(len(numbers) for numbers in micro_steps(accumulation)[:step])


INT8, NF4 = {"frozen_dtype": "int8"}, {"frozen_dtype": "nf4"}
ONE_SIDED = {"trains": "B", "restart_init": "gradient", "gradient_estimate": "warm_sketch", "optimizer_reset": "rotate"}


@pytest.mark.parametrize(
    ("kind", "stage", "precision", "accumulation", "lora_dropout", "frozen"),
    [
        ("callback", 0, "fp32", 1, 0.0, None),
        ("subclass", 1, "fp32", 2, 0.3, None),
        ("callback", 2, "fp32", 2, 0.0, ONE_SIDED),
        ("subclass", 3, "bf16", 1, 0.0, None),
        ("callback", 1, "bf16", 1, 0.0, INT8),
        ("subclass", 3, "fp32", 1, 0.0, NF4),
        *(
            pytest.param(*how, marks=pytest.mark.slow)
            for how in [
                ("callback", 0, "fp32", 2, 0.0, None),
                ("callback", 2, "fp32", 1, 0.0, None),
                ("callback", 3, "fp32", 2, 0.0, None),
                ("callback", 1, "bf16", 1, 0.0, None),
                ("subclass", 3, "bf16", 1, 0.0, ONE_SIDED),
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
    ours = ranks(2).run(our_run, **how)
    resumed = ranks(2).run(trainers_run, str(tmp_path), resume=SAVED_AT, model_seed=1, kind=kind, **how)
    for rank in range(2):
        (run, same_trainer), [new_process] = whole[rank], resumed[rank]
        assert run["restarts"] == ours[rank]["restarts"] == [4, 8, 12] and run["t"] == STEPS
        assert run["losses"] == ours[rank]["losses"]
        assert run["lr"] == pytest.approx(ours[rank]["lr"], rel=1e-12)
        assert [(entry["step"], entry["restarts"]) for entry in run["reports"]] == [(4, 1), (8, 2), (12, 3)]
        rest = run["losses"][num_before(SAVED_AT, accumulation) :]
        for again in (same_trainer, new_process):
            assert again["losses"] == rest
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


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_model_that_transformers_has_partitioned(tmp_path, precision):
    network(0, None).save_pretrained(tmp_path / "model")
    how = dict(stage=3, precision=precision, max_steps=6, eval_strategy="no", save_strategy="no")
    [whole] = ranks(2).run(trainers_run, str(tmp_path), **how)[0]
    [loaded] = ranks(2).run(trainers_run, str(tmp_path), load=str(tmp_path / "model"), **how)[0]
    assert loaded["restarts"] == whole["restarts"] == [4]
    if precision == "fp32":
        assert loaded["losses"] == whole["losses"]
    else:  # transformers loads weights in the precision that trains
        assert loaded["losses"] == pytest.approx(whole["losses"], rel=2e-2)


def best_run(directory: str, stage: int) -> dict:
    with made_trainer(
        directory,
        stage,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        save_steps=3,
        eval_on_start=True,
    ) as trainer:
        trainer.train()
        best = trainer.state.best_global_step
        random = torch.get_rng_state()
        trainer.save_model(f"{directory}/best")
        assert torch.equal(torch.get_rng_state(), random), "saving changed the order of the data that follows"
        return {
            "best": best,
            "t": trainer.model_wrapped.t,
            "eval": summary(trainer)["eval"][best],
            "eval_again": trainer.evaluate()["eval_loss"],
        }


@pytest.mark.parametrize("stage", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_the_best_model_is_loaded_whole(tmp_path, stage):
    found = ranks(2).run(best_run, str(tmp_path), stage)[0]
    assert found["t"] == found["best"] < STEPS
    assert found["eval_again"] == found["eval"]
    assert plain_loss(tmp_path / "best") == pytest.approx(found["eval"], rel=1e-6)


def model_only_run(directory: str) -> str:
    with made_trainer(directory, 3, save_only_model=True) as trainer:
        trainer.train()
    with made_trainer(directory, 3) as trainer:
        return said(lambda: trainer.train(resume_from_checkpoint=f"{directory}/checkpoint-{SAVED_AT}"))


def test_a_checkpoint_of_the_model_only_is_a_model(tmp_path):
    for message in ranks(2).run(model_only_run, str(tmp_path)):
        assert "Can't find a valid checkpoint" in message
    assert plain_loss(tmp_path / f"checkpoint-{SAVED_AT}") > 0


def spoiled_run(directory: str, stage: int) -> dict:
    with made_trainer(directory, stage, save_strategy="no", eval_strategy="no") as trainer:
        trainer.spoiled_step = 2
        trainer.train()
        return {**summary(trainer), "steps": trainer.state.global_step}


@pytest.mark.parametrize("stage", [0, 1])
def test_a_bad_step_moves_no_restart_and_no_rate(tmp_path, stage):
    for run in ranks(2).run(spoiled_run, str(tmp_path), stage):
        assert run["steps"] == STEPS and run["t"] == STEPS - 1
        assert run["restarts"] == [4, 8, 12] and [entry["step"] for entry in run["reports"]] == [5, 9, 13]
        finite = run["losses"][:2] + run["losses"][3:]
        assert all(loss == loss for loss in finite)


def said(action) -> str:
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "accepted"


LINEAR_DECAY = {"num_decay_steps": 20, "decay_type": "linear"}


@pytest.mark.parametrize(
    ("kind", "kwargs", "warmup"),
    [
        ("linear", None, 10),
        ("cosine", None, 10),
        ("cosine_with_min_lr", {"min_lr_rate": 0.2}, 10),
        ("constant", None, 0),
        ("constant_with_warmup", None, 10),
        ("warmup_stable_decay", LINEAR_DECAY, 10),
        ("warmup_stable_decay", {**LINEAR_DECAY, "min_lr_ratio": 0.2}, 0),
    ],
)
def test_without_restarts_the_curve_is_that_of_transformers(tmp_path, kind, kwargs, warmup):
    args = TrainingArguments(str(tmp_path), lr_scheduler_type=kind, lr_scheduler_kwargs=kwargs, warmup_steps=warmup)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = get_scheduler(kind, optimizer, warmup, 100, kwargs).lr_lambdas[0]
    for step in range(100):
        ours = lr_multiplier(step, total_steps=100, warmup_steps=warmup, **curve_of(args))
        assert ours == pytest.approx(theirs(step), abs=1e-12), step


def late_decay(directory: str) -> str:
    kwargs = {"num_decay_steps": STEPS, "decay_type": "linear"}
    with made_trainer(directory, 1, lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=kwargs) as trainer:
        return said(trainer.train)


def test_a_decay_that_meets_a_restart_is_refused(tmp_path):
    [message] = ranks(1).run(late_decay, str(tmp_path))
    assert message.startswith(f"TrainingArguments.lr_scheduler_kwargs num_decay_steps: {STEPS} of {STEPS} steps begins")


def refused(directory: str, changes: dict) -> list[str]:
    """What the callback and the subclass say."""

    def subclass() -> None:
        with made_trainer(directory, 1, kind="subclass", **changes):
            pass

    with made_trainer(directory, 1, kind="nothing", **changes) as trainer:
        found = said(lambda: ReLoRACallback(trainer))
    return [found, said(subclass)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"deepspeed": None}, "TrainingArguments.deepspeed: not set"),
        ({"use_cpu": False}, "set use_cpu=True"),
        ({"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": None}, 'use "linear", "cosine"'),
        ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": None}, 'use "constant_with_warmup"'),
        (  # a cosine decay, by default
            {"lr_scheduler_type": "warmup_stable_decay", "lr_scheduler_kwargs": {"num_decay_steps": 2}},
            '{"num_decay_steps": 100, "decay_type": "linear"}',
        ),
        (
            {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}},
            "TrainingArguments.lr_scheduler_type",
        ),
        ({"optim": "adafactor"}, "TrainingArguments.optim: adafactor"),
        ({"auto_find_batch_size": True}, "TrainingArguments.auto_find_batch_size"),
        ({"torch_compile": True}, "TrainingArguments.torch_compile"),
        (
            {
                "deepspeed": {
                    "zero_optimization": {"stage": 1},
                    "optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.95]}},
                }
            },
            "TrainingArguments.deepspeed optimizer.params.betas: [0.9, 0.95] contradicts TrainingArguments.adam_beta1, "
            "adam_beta2 [0.9, 0.999]",
        ),
        (
            {
                "deepspeed": {
                    "zero_optimization": {"stage": 1},
                    "scheduler": {"type": "WarmupLR", "params": {}},
                    "optimizer": {"type": "Muon", "params": {}},
                }
            },
            "deepspeed scheduler:",
        ),
    ],
)
def test_what_cannot_be_made_right_is_refused(tmp_path, changes, message):
    for said_message in itertools.chain(*ranks(2).run(refused, str(tmp_path), changes)):
        assert message in said_message and "optim." not in said_message.replace("TrainingArguments.optim", "")
        if "Muon" in str(changes):
            assert "Muon" in said_message


def trained_in_8_bit(directory: str) -> str:
    changes = {"optim": "adamw_bnb_8bit", "max_steps": 1, "save_strategy": "no", "eval_strategy": "no"}
    with made_trainer(directory, 1, **changes) as trainer:
        trainer.train()
        return type(trainer.model_wrapped.shards._adapter.inner).__mro__[1].__module__


def test_the_trainers_8_bit_adamw_is_ours(tmp_path):
    pytest.importorskip("bitsandbytes", reason="the extra .[quantization]")
    assert ranks(1).run(trained_in_8_bit, str(tmp_path)) == ["bitsandbytes.optim.adamw"]


def without_bitsandbytes(directory: str) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "bitsandbytes", None)
        return refused(directory, {"optim": "adamw_bnb_8bit"})


def test_8_bit_without_its_library_is_refused(tmp_path):
    for message in ranks(1).run(without_bitsandbytes, str(tmp_path))[0]:
        assert "TrainingArguments.optim: adamw_8bit needs bitsandbytes; pip install" in message


class OwnScheduler(TrainerCallback):
    """Puts another scheduler where the engine's was, as a subclass that overrides create_scheduler would."""

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.lr_scheduler = None


def misused(directory: str) -> dict[str, str]:
    found = {}
    with made_trainer(directory, 3, max_steps=2, save_strategy="no", eval_strategy="no") as trainer:
        found["two callbacks"] = said(lambda: ReLoRACallback(trainer))
        found["no trainer"] = said(lambda: ReLoRACallback(relora_config(), trainer))
        found["evaluation first"] = said(trainer.evaluate)
        found["saving first"] = said(lambda: trainer.save_model(directory))
        trainer.train()
        found["trained again"] = said(trainer.train)
    with made_trainer(directory, 1, kind="subclass") as trainer:
        found["callback and subclass"] = said(lambda: ReLoRACallback(trainer))
        assert type(trainer) is RecordingReLoRATrainer and type(trainer.accelerator) is Accelerator
    with made_trainer(directory, 1, kind="nothing") as trainer:
        found["another config"] = said(lambda: ReLoRACallback(trainer, relora_config(lora_dropout=0.1)))
        ReLoRACallback(trainer, relora_config())
        found["not added"] = said(trainer.train)
    with made_trainer(directory, 1, kind="nothing") as trainer:
        meddler = OwnScheduler()
        meddler.trainer = trainer
        trainer.add_callback(meddler)
        trainer.add_callback(ReLoRACallback(trainer, relora_config()))
        found["another scheduler"] = said(trainer.train)
    with made_trainer(directory, 1, kind="nothing") as trainer:
        trainer.model = trainer.model_wrapped = llama()
        found["not wrapped"] = said(lambda: ReLoRACallback(trainer, relora_config()))
        trainer.optimizer = torch.optim.AdamW(trainer.model.parameters())
        found["own optimizer"] = said(lambda: ReLoRACallback(trainer, relora_config()))
    return found


def test_mistakes_are_named(tmp_path):
    for found in ranks(2).run(misused, str(tmp_path)):
        for mistake, message in {
            "two callbacks": "build a new Trainer",
            "callback and subclass": "build a new Trainer",
            "another config": "config: another one than the model was wrapped with",
            "no trainer": "is no Trainer",
            "evaluation first": "before train()",
            "saving first": "nothing has been trained",
            "trained again": "pass resume_from_checkpoint",
            "not added": "made, but not added",
            "another scheduler": "trains with something else",
            "not wrapped": "call relora_ds.wrap(model, config)",
            "own optimizer": "optimizers:",
        }.items():
            assert message in found[mistake], mistake
