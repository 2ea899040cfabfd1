"""The Trainer's arguments: what becomes of the schedule, and what is refused."""

import itertools
import sys

import pytest
import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainingArguments, get_scheduler

from relora_ds import ReLoRACallback, lr_multiplier
from relora_ds.interop.hf_checks import curve_of
from tests.interop.trainers import STEPS, RecordingReLoRATrainer, made_trainer, relora_config, said
from tests.ranks import ranks
from tests.small_models import llama

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


def of_whole_matrices(directory: str) -> str:
    with made_trainer(directory, 1, frozen={"trains": "none", "restart_every": None}, kind="nothing") as trainer:
        return said(lambda: ReLoRACallback(trainer))


def test_a_model_for_optimizers_of_whole_matrices_is_refused(tmp_path):
    [message] = ranks(1).run(of_whole_matrices, str(tmp_path))
    assert message.startswith("model: it is wrapped with trains='none', for optimizers of whole matrices")


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
