"""`ReLoRATrainer` and `ReLoRACallback`: ReLoRA with the Hugging Face `Trainer`, on DeepSpeed ZeRO stages 0 to 3.

    model = relora_ds.wrap(model, config)
    args = TrainingArguments(deepspeed="ds_configs/zero1.json", lr_scheduler_type="cosine", ...)
    trainer = relora_ds.ReLoRATrainer(model=model, args=args, train_dataset=...)
    trainer.train()

Where somebody else makes the `Trainer`, or its class is not yours to choose:

    trainer.add_callback(ReLoRACallback(trainer))

The callback specialises the class of this one trainer; nothing is patched globally, and a Trainer subclass keeps its
own methods, because ours come between it and `Trainer`. `hf_training` is what both do.
"""

from typing import Any, cast

from transformers import Trainer

from relora_ds.config import IslandsConfig, ReLoRAConfig
from relora_ds.exchange.island import Islands
from relora_ds.interop.hf_checks import problems
from relora_ds.interop.hf_islands import membership
from relora_ds.interop.hf_training import ReLoRATraining, RestartLog


class ReLoRATrainer(ReLoRATraining):
    """A `Trainer` that trains a model wrapped with `relora_ds.wrap`: restarts, their learning rate, merged models.

    Rates, steps and AdamW's values are those of the `TrainingArguments`. The curve is `relora_ds.lr_multiplier`:
    `lr_scheduler_type` "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_min_lr" with
    `lr_scheduler_kwargs={"min_lr_rate": 0.1}`, or "warmup_stable_decay" with `{"num_decay_steps": 100, "decay_type":
    "linear"}`; with a warm-up from 0, and a ramp after every restart. Each restart is logged once, with `restarts`,
    `prune_fraction_m`, `prune_fraction_v`, `merge_loss` and `restart_s` (see `RestartReport`).

    `save_model(dir)` and the model files in every checkpoint are the merged plain model in fp32, for
    `AutoModelForCausalLM.from_pretrained`; `trainer.model` itself stays wrapped.

    Args:
        *args, **kwargs: those of `transformers.Trainer`. `model` is wrapped already, and `args.deepspeed` is set.
        islands: train as one of several islands; each has a `train_dataset` of its own. Exchanges are logged, with
            `exchanges`, `exchange_islands`, `exchange_bytes_sent` and `exchange_s`.

    Raises:
        ValueError: everything about the arguments that ReLoRA cannot train with, at once.
    """

    def __init__(self, *args, islands: IslandsConfig | Islands | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.begin(_accepted(self, None, islands))
        self.add_callback(RestartLog(self))


class ReLoRACallback(RestartLog):
    """ReLoRA in a `Trainer` whose class is not yours to choose; otherwise use `ReLoRATrainer`, which does the same.

    Add it before training: `trainer.add_callback(ReLoRACallback(trainer))`.

    Args:
        trainer: its model wrapped with `relora_ds.wrap`, not trained yet.
        config: not needed: the model carries the one that it was wrapped with.
        islands: train as one of several islands, see `ReLoRATrainer`.

    Raises:
        ValueError: everything about the trainer that ReLoRA cannot train with, at once; `config` is another one than
            the model's.
    """

    def __init__(
        self,
        trainer: Trainer,
        config: ReLoRAConfig | None = None,
        islands: IslandsConfig | Islands | None = None,
    ):
        if not isinstance(trainer, Trainer):
            raise ValueError(
                f"trainer: {type(trainer).__name__} is no Trainer; use trainer.add_callback(ReLoRACallback(trainer))"
            )
        member = _accepted(trainer, config, islands)
        super().__init__(trainer)
        own = type(trainer)
        trainer.__class__ = (
            ReLoRATraining if own is Trainer else type(f"ReLoRA{own.__name__}", (own, ReLoRATraining), {})
        )
        cast(ReLoRATraining, trainer).begin(member)


def _accepted(trainer: Trainer, config: ReLoRAConfig | None, islands: IslandsConfig | Islands | None) -> Islands | None:
    """Return the membership of a Trainer that ReLoRA can train with. ValueError: it cannot."""
    if found := problems(trainer, config):
        raise ValueError("\n".join(found))
    member = membership(islands, trainer.args)
    if member is not None and (found := member.problems(cast(Any, trainer.model).relora_config)):
        raise ValueError("\n".join(found))
    return member
