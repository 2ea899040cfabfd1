"""Trainers on a small wrapped model: made, run, and forgotten by the process."""

import contextlib
import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments

import relora_ds
from relora_ds import IslandsConfig, ReLoRACallback, ReLoRATrainer
from tests.parity import cases
from tests.small_models import batch, llama
from tests.zero.restarts import fingerprint

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
            if self.state.global_step == self.spoiled_step and dist.get_rank() == dist.get_world_size() - 1:
                loss = loss * float("nan")
                self.spoiled_step = None  # of an island it is not counted
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
    return cases.relora_config(**{"restart_every": EVERY, "restart_warmup_steps": REWARM, **changes})


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
    islands: IslandsConfig | None = None,
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
        datasets = {"train_dataset": rows(data), "eval_dataset": rows(EVAL_ROWS)}
        more = {"islands": islands} if kind == "subclass" else {}
        trainer = CLASSES[kind](model=model, args=arguments, **datasets, **more)
        trainer.losses, trainer.rows = [], []
        trainer.remove_callback(PrinterCallback)
        if kind == "callback":
            trainer.add_callback(ReLoRACallback(trainer, islands=islands))
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
        "weights": fingerprint(trainer.model_wrapped.collect_merged()),
        "lr": [entry["learning_rate"] for entry in history if "learning_rate" in entry],
        "eval": {entry["step"]: entry["eval_loss"] for entry in history if "eval_loss" in entry},
        "exchanges": [(entry["step"], entry["exchanges"]) for entry in history if "exchanges" in entry],
        "is_in_train": trainer.is_in_train,
        "reports": [entry for entry in history if "restarts" in entry],
    }


def trainers_run(
    directory: str,
    *,
    resume: int | None = None,
    again: bool = False,
    save: str | None = None,
    spoiled_step: int | None = None,
    **how,
) -> list[dict]:
    """A run; with `again`, a second one of the same trainer, from the middle."""
    with made_trainer(directory, **how) as trainer:
        trainer.spoiled_step = spoiled_step
        trainer.train(resume_from_checkpoint=f"{directory}/checkpoint-{resume}" if resume else None)
        found = [summary(trainer)]
        if save:
            trainer.save_model(save)
        if again:
            trainer.losses, trainer.rows = [], []
            trainer.train(resume_from_checkpoint=f"{directory}/checkpoint-{SAVED_AT}")
            found.append(summary(trainer))
    return found


def plain_loss(directory: Path) -> float:
    """The evaluation loss of the model that `from_pretrained` finds there; nothing in it may be low-rank."""
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if "lora" in name]  # noqa: SIM118 (not a dict)
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    assert model.dtype == torch.float32
    with torch.no_grad():
        return model(input_ids=EVAL_ROWS, labels=EVAL_ROWS).loss.item()


def said(action) -> str:
    try:
        action()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "accepted"
