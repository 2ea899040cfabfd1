"""What is compared: full rank, LoRA by PEFT on DeepSpeed, and ours, each as an engine that trains the same network."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from relora_ds.config import RecipeError, preset_names

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from relora_ds.training.preflight import Plan, Resolved

FULL = "full rank"
_ONE_SIDED = ("relora.trains=B", "relora.restart_init=random")
_FROM_GRADIENT = ("relora.trains=B", "relora.restart_init=gradient")
# name -> overrides of the recipe; those of PEFT only choose its rank
VARIANTS = {
    FULL: ("method=full",),
    "PEFT, its default": (),  # LoRA alone trains
    "PEFT, same modules train": (),
    "ours, LoRA alone": ("relora.trainable_modules=[]",),
    "ours, dense": (),
    "ours, bf16": ("relora.frozen_dtype=bf16",),
    "ours, int8": ("relora.frozen_dtype=int8",),
    "ours, fp8": ("relora.frozen_dtype=fp8",),
    "ours, nf4": ("relora.frozen_dtype=nf4",),
    "ours, nf4 double": ("relora.frozen_dtype=nf4", "relora.frozen_double_quant=true"),
    "ours, separate": ("relora.product=separate",),
    "ours, folded": ("relora.product=folded",),
    "ours, one-sided, separate": (*_ONE_SIDED, "relora.product=separate"),
    "ours, one-sided, folded": (*_ONE_SIDED, "relora.product=folded"),
    "ours, one-sided, random": _ONE_SIDED,
    "ours, one-sided, sketch": _FROM_GRADIENT,
    "ours, one-sided, warm sketch": (*_FROM_GRADIENT, "relora.gradient_estimate=warm_sketch"),
    "ours, one-sided, exact": (*_FROM_GRADIENT, "relora.gradient_estimate=exact"),
    "ours, one-sided, residual": (*_ONE_SIDED, "relora.residual_every=20"),
    "SwitchLoRA": ("method=switchlora", "relora.restart_every=null", "relora.lora_alpha=1"),
    "CoLA": ("method=cola",),
    "CR-Net": ("method=crnet",),
    "Fira": ("method=fira",),
    "APOLLO": ("method=apollo",),
    "APOLLO-Mini": ("method=apollo_mini",),
    "SCALE": ("method=scale",),
    "Muon": ("method=muon", "muon.precision=bf16"),  # as the shipped recipes
    "SST": ("method=sst",),
}
# name -> what of its Spec is said by the name
COMPARED: dict[str, dict[str, Any]] = {
    **{name: {"variant": name} for name in VARIANTS},
    "full rank, compiled": {"variant": FULL, "compile": True},
    "ours, compiled": {"variant": "ours, dense", "compile": True},
    "ours, recomputed": {"variant": "ours, dense", "checkpointing": "full"},
    "CoLA-M": {"variant": "CoLA", "checkpointing": "low_rank"},
    "CR-Net, inverted": {"variant": "CR-Net", "checkpointing": "inverted"},
}

# Of PEFT's, which of ours trains the same.
TWINS = {"PEFT, its default": "ours, LoRA alone", "PEFT, same modules train": "ours, dense"}
# What PEFT has to be told for the modules to train that train here: embeddings, head and norms of LLaMA.
MODULES_TO_SAVE = ["embed_tokens", "lm_head", "input_layernorm", "post_attention_layernorm", "norm"]


# Few layers, as wide as those of 1.3B or of 350M parameters: name -> layers, width, inner width, heads
WIDE = {"wide_2": (2, 2048, 5461, 16), "wide_4": (4, 2048, 5461, 16), "medium_4": (4, 1024, 2736, 16)}


@dataclasses.dataclass(frozen=True)
class Spec:
    """One measurement: a variant, and the recipe that all of them share.

    Attributes:
        variant: one of VARIANTS.
        preset: of the network's shape, one of WIDE, or a directory with its config.json.
        placement: of the frozen weights, for ours; matters at stage 3.
        master: where the fp32 masters of the frozen weights are, for ours.
        threads: CPU threads; None for PyTorch's number.
        compile: by torch.compile; of ours and full rank.
    """

    variant: str
    preset: str
    r: int
    vocab_size: int
    micro_batch_size: int
    seq_len: int
    precision: str
    checkpointing: str = "none"
    stage: int = 1
    accumulation: int = 1
    placement: str = "auto"
    master: str = "cpu"
    threads: int | None = None
    compile: bool = False

    @property
    def is_peft(self) -> bool:
        return self.variant.startswith("PEFT")

    def overrides(self, world_size: int) -> list[str]:
        shape = _wide(*WIDE[self.preset], self.vocab_size).name if self.preset in WIDE else self.preset
        key = "model.name_or_path" if shape not in preset_names() and Path(shape).is_dir() else "model.preset"
        return [
            f"{key}={shape}",
            f"data.vocab_size={self.vocab_size}",
            f"data.seq_len={self.seq_len}",
            f"train.micro_batch_size={self.micro_batch_size}",
            f"train.batch_sequences={self.micro_batch_size * self.accumulation * world_size}",
            f"relora.r={self.r}",
            f"relora.lora_alpha={self.r}",
            f"cola.r={self.r}",
            f"crnet.r={self.r}",
            "relora.restart_every=1000",
            "warm_start_steps=0",
            f"relora.frozen_placement={self.placement}",
            f"relora.frozen_master={self.master}",
            f"precision={self.precision}",
            f"activation_checkpointing={self.checkpointing}",
            f"deepspeed=zero{self.stage}",
            f"compile={str(self.compile).lower()}",
            *VARIANTS[self.variant],
        ]


@functools.cache
def _wide(layers: int, width: int, inner: int, heads: int, vocab_size: int) -> tempfile.TemporaryDirectory:
    """Return a directory with the configuration, which lives as long as the process."""
    from transformers import LlamaConfig

    directory = tempfile.TemporaryDirectory()
    LlamaConfig(
        vocab_size=vocab_size,
        tie_word_embeddings=False,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
    ).save_pretrained(directory.name)
    return directory


def require(specs: Iterable[Spec]) -> None:
    """Find what is wrong before a rank is started. ValueError: a library that is missing, a shape that cannot be."""
    from relora_ds.training.preflight import machine_problems, resolve

    found = []
    for spec in specs:
        if spec.is_peft and importlib.util.find_spec("peft") is None:
            found.append("--variants: PEFT is not installed; pip install '.[peft]', or leave it out")
        try:
            found += machine_problems(resolve("tiny", spec.overrides(1), 1, to_run=False).recipe)
        except RecipeError as error:
            found += error.problems
    if found:
        raise ValueError("\n".join(dict.fromkeys(found)))


def build(spec: Spec):
    """Return the engine that the trainer would build; for PEFT the same call with PEFT's model."""
    from relora_ds.models import recompute
    from relora_ds.models.build import build_model
    from relora_ds.planning.network import network_of
    from relora_ds.training.phases import build_engine, phases_of
    from relora_ds.training.preflight import resolve
    from relora_ds.zero.initialize import initialize

    world_size = dist.get_world_size() if dist.is_initialized() else 1
    resolved = resolve("tiny", spec.overrides(world_size), world_size, to_run=False)
    config, _ = network_of(resolved.recipe)
    (phase,) = phases_of(resolved.recipe)
    if not spec.is_peft:
        plan = without_corpus(resolved, config)
        return build_engine(plan, phase)
    from peft import LoraConfig, get_peft_model

    model = recompute.apply(build_model(config, resolved.recipe.model, resolved.recipe.seed), spec.checkpointing)
    trained = MODULES_TO_SAVE if "same" in spec.variant else None
    adapted = get_peft_model(
        model, LoraConfig(r=spec.r, lora_alpha=spec.r, target_modules="all-linear", modules_to_save=trained)
    )
    return initialize(
        adapted,
        resolved.deepspeed,
        lr=1e-3,
        total_steps=phase.total_steps,
        precision=spec.precision,
        micro_batch_size=spec.micro_batch_size,
        gradient_accumulation_steps=spec.accumulation,
    )[0]


def without_corpus(resolved: Resolved, config: PretrainedConfig) -> Plan:
    """Return the plan of a recipe whose engine is fed with random tokens."""
    from relora_ds.training.preflight import Plan

    return Plan(**vars(resolved), data=None, tokenizer=None, model_config=config)  # type: ignore[arg-type]  # not read


def flops_per_token(spec: Spec) -> float:
    """Return the FLOPs of forward and backward, without recomputed activations; storage formats change nothing.

    Products that PEFT's layers make separately are counted so.
    """
    from relora_ds.methods import method_of
    from relora_ds.planning import link
    from relora_ds.planning.network import network_of, shapes_of
    from relora_ds.planning.planned_product import saved_by_folding
    from relora_ds.training.preflight import resolve

    is_peft = spec.is_peft
    spec = dataclasses.replace(spec, variant=TWINS.get(spec.variant, spec.variant))
    recipe = resolve("tiny", spec.overrides(1), 1, to_run=False).recipe
    config, _ = network_of(recipe)
    method = method_of(recipe)
    separate = link.flops_per_token(shapes_of(method, config), config, spec.seq_len)
    return separate if is_peft else separate - saved_by_folding(method, config, spec.micro_batch_size * spec.seq_len)


@dataclasses.dataclass
class Seconds:
    """Of one optimizer step, by part. On CUDA parts are told apart by the clock `synchronized` only."""

    forward: float = 0.0
    backward: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward + self.optimizer


def synchronized() -> float:
    """Return the time, when the device has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def step(engine, spec: Spec, number: int, clock: Callable[[], float] = time.perf_counter) -> Seconds:
    """One optimizer step on random tokens, others on every rank; at its end the device is waited for.

    clock: read after every part.
    """
    found = Seconds()
    for i, tokens in enumerate(_micro_batches(spec, number, engine.device)):
        started = clock()
        loss = engine(input_ids=tokens, labels=tokens).loss
        after_forward = clock()
        engine.backward(loss)
        after_backward = clock()
        engine.step()
        if i == spec.accumulation - 1:
            synchronized()
        found.forward += after_forward - started
        found.backward += after_backward - after_forward
        found.optimizer += clock() - after_backward
    return found


def seconds_of_steps(engine, spec: Spec, number: int, count: int, clock: Callable[[], float] = synchronized) -> float:
    """Return the seconds of one of `count` optimizer steps in a row. Waits for the device once, after the last."""
    batches = [tokens for i in range(count) for tokens in _micro_batches(spec, number + i, engine.device)]
    started = clock()
    for tokens in batches:
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
    return (clock() - started) / count


def _micro_batches(spec: Spec, number: int, device: torch.device) -> list[Tensor]:
    """Return the tokens of this rank's step `number`, on the device."""
    generator = torch.Generator().manual_seed(1_000_000 * dist.get_rank() + number)
    return [
        torch.randint(0, spec.vocab_size, (spec.micro_batch_size, spec.seq_len), generator=generator).to(device)
        for _ in range(spec.accumulation)
    ]
