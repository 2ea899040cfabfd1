"""Run a small copy of a model, before anything is built, to see that it can be trained as asked for.

Source code and shapes do not tell whether a model predicts the next token, or whether a low-rank update reaches its
output. A copy of the same structure (`models.tiny`) does, in less than a second and without data:

    the model     its loss is the cross-entropy of the next token, and no logit depends on later tokens
    wrapped       the same function with B = 0; every B gets a gradient; merged equals live; stored weights work
"""

import copy
import dataclasses
import logging

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.formats import DENSE, format_of
from relora_ds.lowrank.targets import generic, matches, named_places, summary
from relora_ds.lowrank.wrap import lowrank_layers, merge_and_unwrap, target_linears, wrap_quietly
from relora_ds.models.build import meta_model
from relora_ds.models.loading import from_config
from relora_ds.models.tiny import tiny_config

SAME = 2e-5  # of logits, relative, in fp32; rounding alone gives 5e-7 in a LLaMA and 1e-5 in a Gemma 4
_BATCH, _LENGTH = 4, 32
_MAX_BATCHES = 4  # until every routed expert has had a token


@dataclasses.dataclass(frozen=True)
class Proof:
    """What running a small copy showed.

    Attributes:
        problems: why the model cannot be trained, `field: …; remedy`.
        warnings: what could not be shown.
    """

    problems: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)


class _NotRunnableError(Exception):
    """The small copy cannot be built, or not run on text alone."""


class _UnsupportedAttentionError(Exception):
    """The family has no such implementation of attention."""


def prove(
    config: PretrainedConfig,
    relora: ReLoRAConfig | None,
    *,
    base: bool = True,
    precision: str = "fp32",
    attention: str = "sdpa",
    next_token: bool = True,
) -> Proof:
    """Run a small copy of the model that `config` describes.

    Args:
        config: of any size; left as it is.
        relora: which linears are wrapped, in a recipe without other problems; None checks the plain model only.
        base: whether there are frozen weights under the low-rank updates.
        precision: that of the run, which decides how frozen weights are stored.
        attention: the recipe's `model.attn_implementation`; one that needs a GPU is replaced.
        next_token: check the plain model as well: its loss is that of the next token, and text is all that it needs.

    Returns:
        Problems and warnings. Global random state and loggers stay as they are.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        with torch.random.fork_rng(devices=[]):
            return _prove(
                config, relora, base, precision, attention if attention in ("sdpa", "eager") else "eager", next_token
            )
    except _UnsupportedAttentionError:
        otherwise = prove(config, relora, base=base, precision=precision, attention="eager", next_token=next_token)
        if otherwise.problems:
            return otherwise
        return Proof(
            [
                f"model.attn_implementation: {attention} is not supported by transformers' {config.model_type} "
                "models; use model.attn_implementation=eager"
            ]
        )
    except _NotRunnableError as error:
        if next_token and type(config).__module__.startswith("transformers."):  # not the copy's fault: see tests/models
            return Proof(
                [
                    f"model.name_or_path: transformers' {config.model_type} models of this configuration cannot "
                    f"be run on text alone ({error}); correct the configuration, or choose a decoder-only family "
                    "such as LLaMA, Qwen or GPT-NeoX"
                ]
            )
        what = "the model" if relora is None else "the model and its low-rank updates"
        return Proof(
            warnings=[
                f"model: {what} could not be tried on a small copy ({error}); compare the first "
                "training and validation losses"
            ]
        )
    finally:
        transformers_logging.set_verbosity(level)


def _prove(
    config: PretrainedConfig, relora: ReLoRAConfig | None, base: bool, precision: str, attention: str, next_token: bool
) -> Proof:
    model = _small_model(config, attention)
    ids = _tokens(model, 0)
    try:
        with torch.no_grad():
            plain = _run(model, ids)
            later = ids.clone()
            later[:, -1] = _tokens(model, 1)[:, -1]
            ahead = _distance(plain.logits[:, :-1], _run(model, later).logits[:, :-1])
    except Exception as error:  # whatever the code of a family raises
        raise _NotRunnableError(_first_line(error)) from error
    if next_token and (found := _language_model_problems(config, plain, ids, ahead)):
        return Proof(found)
    if relora is None:
        return Proof()
    names = target_linears(meta_model(config), relora)
    kinds = {generic(name) for name in names}
    here = {
        name: generic(name)
        for (name, *_), module in named_places(model)
        if isinstance(module, nn.Linear) and generic(name) in kinds
    }
    if not here:
        raise _NotRunnableError("it has none of relora.target_modules")
    trial = _Trial(
        model,
        dataclasses.replace(
            relora, r=1, lora_alpha=1.0, lora_dropout=0.0, exclude_modules=None, trainable_modules=None
        ),
        base,
        precision,
    )
    faults = trial.faults(sorted(here))
    if faults and set(faults.values()) != {_NO_GRADIENT}:  # which kinds of linears are they?
        faults = {
            name: reason
            for kind in sorted(kinds)
            for name, reason in trial.faults([name for name in here if here[name] == kind]).items()
        } or faults
    reasons: dict[str, set[str]] = {}
    for name, reason in faults.items():
        reasons.setdefault(reason, set()).add(here[name])
    missing = kinds - set(here.values())
    warnings = (
        [f"relora.target_modules: {summary(sorted(missing))} could not be tried on a small copy"] if missing else []
    )
    return Proof(
        [
            _problem(reason, [name for name in names if generic(name) in bad], list(names))
            for reason, bad in reasons.items()
        ],
        warnings,
    )


def _small_model(config: PretrainedConfig, attention: str) -> PreTrainedModel:
    """The small copy, fp32 on the CPU, every weight random: those that start at 0 would let no gradient through."""
    try:
        small = tiny_config(config)
        text = small.get_text_config(decoder=True)
        small.use_cache = text.use_cache = False
        if getattr(text, "pad_token_id", None) is None:
            text.pad_token_id = 0  # some families count positions from it; the run's is the tokenizer's
        torch.default_generator.manual_seed(0)
        model = from_config(small, dtype=torch.float32, attn_implementation=attention)
    except Exception as error:  # whatever the code of a family raises
        if attention != "eager" and "does not support an attention implementation" in str(error):
            raise _UnsupportedAttentionError from error
        raise _NotRunnableError(_first_line(error)) from error
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model.eval()


def _tokens(model: PreTrainedModel, seed: int) -> Tensor:
    vocab = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(min(5, vocab - 1), vocab, (_BATCH, _LENGTH), generator=torch.Generator().manual_seed(seed))


def _run(model: nn.Module, ids: Tensor):
    torch.default_generator.manual_seed(0)  # some families draw random numbers in evaluation too
    return model(input_ids=ids, labels=ids)


def _distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / one.norm()).item()


def _language_model_problems(config: PretrainedConfig, output, ids: Tensor, ahead: float) -> list[str]:
    """Why the plain model would not learn to predict the next token."""
    family = f"transformers' {config.model_type} models"
    remedy = "choose a decoder-only family such as LLaMA, Qwen or GPT-NeoX"
    if output.logits.shape[:2] != ids.shape:
        return [
            f"model.name_or_path: {family} give logits of shape {tuple(output.logits.shape)} for ids of shape "
            f"{tuple(ids.shape)}; {remedy}"
        ]
    if not ahead <= 1e-4:
        return [
            f"model.name_or_path: {family} let a token see those after it, so that they cannot be trained to "
            f"predict the next one; set is_decoder: true in their configuration if they have it, or {remedy}"
        ]
    if output.loss is None:
        return [f"model.name_or_path: {family} compute no loss from labels; {remedy}"]
    flat = output.logits.float()
    shifted = F.cross_entropy(flat[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    copied = F.cross_entropy(flat.flatten(0, 1), ids.flatten()).item()
    loss = output.loss.item()
    if abs(loss - copied) <= 1e-5 * abs(copied):
        kind = ", an encoder-decoder's decoder," if getattr(config, "is_encoder_decoder", False) else ""
        return [
            f"model.name_or_path: {family}{kind} do not shift the labels: their loss is that of repeating each "
            f"token, not of predicting the next one; {remedy}"
        ]
    if abs(loss - shifted) > 1e-4 * abs(shifted) and getattr(output, "aux_loss", None) is None:
        return [
            f"model.name_or_path: {family} return a loss of {loss:.4f} where the cross-entropy of the next token "
            f"is {shifted:.4f}: training and validation loss would not be comparable; {remedy}"
        ]
    return []


_NO_GRADIENT = "would not train: no gradient reaches its low-rank update (it is not called, or its result is not used)"


class _Trial:
    """Wraps copies of the small model and compares them with it."""

    def __init__(self, model: PreTrainedModel, relora: ReLoRAConfig, base: bool, precision: str):
        self.model, self.relora, self.base, self.precision = model, relora, base, precision

    def faults(self, names: list[str]) -> dict[str, str]:
        """Return `{name: reason}` for the linears in `names` that cannot be wrapped."""
        ids = _tokens(self.model, 0)
        with torch.no_grad():
            plain = _run(self.model, ids).logits
        try:
            model = wrap_quietly(
                copy.deepcopy(self.model), dataclasses.replace(self.relora, target_modules=names), base=self.base
            )
            if self.base:
                with torch.no_grad():
                    if not _distance(plain, _run(model, ids).logits) <= SAME:
                        return dict.fromkeys(names, "changes the model's function when it is wrapped")
            if untrained := _without_gradient(model):
                return dict.fromkeys(untrained, _NO_GRADIENT)
            with torch.no_grad():
                return self._merge_faults(model, ids, names)
        except Exception as error:  # whatever the code of a family raises
            return dict.fromkeys(names, f"fails when it is wrapped ({_first_line(error)})")

    def _merge_faults(self, model: nn.Module, ids: Tensor, names: list[str]) -> dict[str, str]:
        layers = lowrank_layers(model)
        for layer in layers.values():
            nn.init.normal_(layer.lora_B, std=0.01)
        live = _run(model, ids).logits
        merged = merge_and_unwrap(copy.deepcopy(model))
        if not _distance(live, _run(merged, ids).logits) <= SAME:
            return dict.fromkeys(names, "is another function when it is merged")
        format = format_of(self.relora.frozen_dtype, self.precision) if self.base else DENSE
        if format is DENSE or format.unavailable():
            return {}
        layers = {name: layer for name, layer in layers.items() if not format.problem(layer.weight_shape)}
        stored = {name: format.quantize(layer.weight.detach(), torch.float32) for name, layer in layers.items()}
        for name, layer in layers.items():
            layer.weight.copy_(format.dequantize(stored[name], layer.weight_shape, torch.float32))
        dense = _run(model, ids).logits
        for name, layer in layers.items():
            layer.store_weight(stored[name], format, as_buffer=True)
        if not _distance(dense, _run(model, ids).logits) <= SAME:
            return dict.fromkeys(names, f"is another function with relora.frozen_dtype {self.relora.frozen_dtype}")
        return {}


def _without_gradient(model: nn.Module) -> list[str]:
    """Return the wrapped layers whose B gets no gradient. An expert without a token goes by the others of its kind."""
    layers, missing = lowrank_layers(model), []
    model.train()
    for number in range(_MAX_BATCHES):
        torch.default_generator.manual_seed(number)
        ids = _tokens(model, number)
        model(input_ids=ids, labels=ids).loss.backward()
        missing = [name for name, layer in layers.items() if layer.lora_B.grad is None or not layer.lora_B.grad.any()]
        if not missing:
            break
    model.eval()
    trains = {_without_experts(name) for name in layers.keys() - set(missing)}
    return [name for name in missing if "expert" not in name or _without_experts(name) not in trains]


def _without_experts(name: str) -> str:
    head, experts, rest = name.partition("experts.")
    return head + experts + rest.partition(".")[2]


def _problem(reason: str, bad: list[str], names: list[str]) -> str:
    patterns = list(dict.fromkeys(_shortest_pattern(name, bad, names) for name in bad))
    return (
        f"relora.target_modules: {summary(bad)} {reason}; leave it out with "
        f"relora.exclude_modules=[{', '.join(patterns)}]"
    )


def _shortest_pattern(name: str, bad: list[str], names: list[str]) -> str:
    """Return the shortest suffix of a name that names linears in `bad` only."""
    parts, others = name.split("."), set(names) - set(bad)
    suffixes: list[str] = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
    return next(suffix for suffix in suffixes if not any(matches(other, [suffix]) for other in others))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
