"""Run a small copy of a model, before anything is built, to see that it can be trained as asked for.

Source code and shapes do not tell whether a model predicts the next token, or whether a low-rank update reaches its
output. A copy of the same structure (`models.tiny`) does, in less than a second and without data:

    the model     its loss is the cross-entropy of the next token, and no logit depends on later tokens
    documents     each of several in a row gives the logits that it gives alone
    wrapped       the same function with B = 0; every B gets a gradient; merged equals live; stored weights work
"""

import dataclasses
import logging

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.utils import logging as transformers_logging

from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.peculiarities import is_linear
from relora_ds.lowrank.targets import find_targets, generic, matches, named_places, summary
from relora_ds.methods import separation
from relora_ds.methods.small_copy import (
    NotRunnableError,
    UnsupportedAttentionError,
    distance,
    first_line,
    language_model_problems,
    run,
    small_model,
    tokens,
)
from relora_ds.methods.trial import NO_GRADIENT, Trial
from relora_ds.models.attention import EVERYWHERE
from relora_ds.models.build import meta_model


@dataclasses.dataclass(frozen=True)
class Proof:
    """What running a small copy showed.

    Attributes:
        problems: why the model cannot be trained, `field: …; remedy`.
        warnings: what could not be shown.
    """

    problems: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)


def prove(
    config: PretrainedConfig,
    relora: ReLoRAConfig | None,
    *,
    base: bool = True,
    precision: str = "fp32",
    attention: str = "sdpa",
    next_token: bool = True,
    documents: bool = False,
) -> Proof:
    """Run a small copy of the model that `config` describes.

    Args:
        config: of any size; left as it is.
        relora: which linears are wrapped, in a recipe without other problems; None checks the plain model only.
        base: whether there are frozen weights under the low-rank updates.
        precision: that of the run, which decides how frozen weights are stored.
        attention: the recipe's `model.attn_implementation`; one that needs a GPU is replaced.
        next_token: check the plain model as well: its loss is that of the next token, and text is all that it needs.
        documents: check that the plain model keeps the documents in a row apart.

    Returns:
        Problems and warnings. Global random state and loggers stay as they are.
    """
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.CRITICAL)
    try:
        with torch.random.fork_rng(devices=[]):
            return _prove(config, relora, base, precision, attention, next_token, documents)
    except UnsupportedAttentionError:
        otherwise = prove(config, relora, base=base, precision=precision, attention="eager", next_token=next_token)
        if otherwise.problems:
            return otherwise
        return Proof(
            [
                f"model.attn_implementation: {attention} is not supported by transformers' {config.model_type} "
                "models; use model.attn_implementation=eager"
            ]
        )
    except NotRunnableError as error:
        if next_token and type(config).__module__.startswith("transformers."):  # not the copy's fault: see tests/models
            return Proof(
                [
                    f"model.name_or_path: transformers' {config.model_type} models of this configuration cannot "
                    f"be run on text alone ({error}); correct the configuration, or choose a decoder-only family "
                    "such as LLaMA, Qwen or GPT-NeoX"
                ]
            )
        parts = ["the model", *["its document masks"] * documents, *["its low-rank updates"] * (relora is not None)]
        what = " and ".join(filter(None, [", ".join(parts[:-1]), parts[-1]]))
        return Proof(
            warnings=[
                f"model: {what} could not be tried on a small copy ({error}); compare the first "
                "training and validation losses"
            ]
        )
    finally:
        transformers_logging.set_verbosity(level)


def _prove(
    config: PretrainedConfig,
    relora: ReLoRAConfig | None,
    base: bool,
    precision: str,
    attention: str,
    next_token: bool,
    documents: bool,
) -> Proof:
    model = small_model(config, attention if attention in EVERYWHERE else "eager")
    ids = tokens(model, 0)
    try:
        with torch.no_grad():
            plain = run(model, ids)
            later = ids.clone()
            later[:, -1] = tokens(model, 1)[:, -1]
            ahead = distance(plain.logits[:, :-1], run(model, later).logits[:, :-1])
    except Exception as error:  # whatever the code of a family raises
        raise NotRunnableError(first_line(error)) from error
    if next_token and (found := language_model_problems(config, plain, ids, ahead)):
        return Proof(found)
    if documents and (found := separation.problems(model, config, attention)):
        return Proof(found)
    if relora is None:
        return Proof()
    names = list(find_targets(meta_model(config), relora).weights)
    kinds = {generic(name) for name in names}
    here = {name: generic(name) for name in _possible_targets(model) if generic(name) in kinds}
    if not here:
        raise NotRunnableError("it has none of relora.target_modules")
    trial = Trial(
        model,
        dataclasses.replace(
            relora,
            r=1,
            lora_alpha=1.0,
            lora_dropout=0.0,
            exclude_modules=None,
            trainable_modules=None,
            use_rslora=False,
        ),
        base,
        precision,
    )
    faults = trial.faults(sorted(here))
    if faults and set(faults.values()) != {NO_GRADIENT}:  # which kinds of linears are they?
        faults = {
            name: reason
            for kind in sorted(set(here.values()))
            for name, reason in trial.faults([name for name in here if here[name] == kind]).items()
        } or faults
    reasons: dict[str, set[str]] = {}
    for name, reason in faults.items():
        reasons.setdefault(reason, set()).add(here[name])
    missing = kinds - set(here.values())
    warnings = (
        [f"relora.target_modules: {summary(sorted(missing))} could not be tried on a small copy"] if missing else []
    )
    parameters = {here[name] for name in here if trial.is_parameter(name)}
    problems = []
    for reason, bad in reasons.items():
        linears, others = ([n for n in names if generic(n) in kind] for kind in (bad - parameters, bad & parameters))
        problems += [_problem(reason, linears, names)] if linears else []
        problems += [_parameter_problem(reason, others)] if others else []
    return Proof(problems, warnings)


def _possible_targets(model: nn.Module) -> list[str]:
    """Return the names of all linears and embeddings, and of all parameters of other modules."""
    found = []
    for (name, *_), module in named_places(model):
        is_whole = is_linear(module) or isinstance(module, nn.Embedding)
        found += [name] if is_whole else [f"{name}.{leaf}" for leaf in module._parameters]
    return found


def _problem(reason: str, bad: list[str], names: list[str]) -> str:
    patterns = list(dict.fromkeys(_shortest_pattern(name, bad, names) for name in bad))
    return (
        f"relora.target_modules: {summary(bad)} {reason}; leave it out with "
        f"relora.exclude_modules=[{', '.join(patterns)}]"
    )


def _parameter_problem(reason: str, bad: list[str]) -> str:
    return f"relora.target_parameters: {summary(bad)} {reason}; leave it out of relora.target_parameters"


def _shortest_pattern(name: str, bad: list[str], names: list[str]) -> str:
    """Return the shortest suffix of a name that names linears in `bad` only."""
    parts, others = name.split("."), set(names) - set(bad)
    suffixes: list[str] = [".".join(parts[-length:]) for length in range(1, len(parts) + 1)]
    return next(suffix for suffix in suffixes if not any(matches(other, [suffix]) for other in others))
