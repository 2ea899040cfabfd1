"""A sweep over every causal language model family of the installed transformers, scaled down.

Either wrapping keeps the model's function, every B trains, merging gives the live model, and training and evaluation
compute the same loss; or the family is refused by name before anything is built. `families.py` lists what is refused.
"""

import inspect
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel, masking_utils
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from relora_ds.config import ModelConfig, RecipeError, ReLoRAConfig
from relora_ds.lowrank.wrap import lowrank_layers, merge_and_unwrap, wrap
from relora_ds.models.build import build_model
from relora_ds.models.tiny import tiny_config
from relora_ds.training.preflight import resolve
from tests.models.families import CHANGES, DECODERS_ON_REQUEST, LEFT_OUT, REFUSED

VARIANTS = {
    **{family: CHANGES.get(family, {}) for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES},
    **{f"{family} as decoder": {**CHANGES.get(family, {}), "is_decoder": True} for family in DECODERS_ON_REQUEST},
}


def refusals(directory: Path, attention: str, exclude: list[str]) -> list[str]:
    """What `check` has against a recipe that names the configuration in `directory`."""
    try:
        resolve(
            "tiny",
            [
                "model.preset=null",
                f"model.name_or_path={directory}",
                f"run_dir={directory / 'run'}",
                f"model.attn_implementation={attention}",
                f"relora.exclude_modules={exclude or 'null'}",
            ],
        )
    except RecipeError as error:
        return error.problems
    return []


def run(model: PreTrainedModel, ids: torch.Tensor):
    with torch.random.fork_rng(devices=[]):  # dropout, and Reformer's hashes
        torch.manual_seed(0)
        return model(input_ids=ids, labels=ids)


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    """The norm of the difference, relative to the norm. Rounding alone gives 5e-7 in a LLaMA, 5e-6 in a Gemma 3n."""
    return ((one - other).norm() / one.norm()).item()


def assert_left_out(model: PreTrainedModel, parts: list[str]) -> None:
    """Assert that the linears that were not wrapped, beside the head, are those with one of `parts` in their names."""
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not model.get_output_embeddings()
    ]
    assert [name for name in names if not set(parts) & set(name.split("."))] == []
    assert [part for part in parts if not any(part in name.split(".") for name in names)] == []
    assert [name for name in lowrank_layers(model) if set(parts) & set(name.split("."))] == []


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_family_trains_or_is_refused_by_name(variant, tmp_path):
    config = small_configuration(variant)
    config.save_pretrained(tmp_path)
    attention, exclude, found = follow_remedies(tmp_path)
    if variant in REFUSED:
        assert found, f"{variant} is not refused: take it out of families.REFUSED"
        assert any(REFUSED[variant] in problem for problem in found), found
        return
    assert found == []
    config.use_cache = False
    model = build_model(config, ModelConfig(attn_implementation=attention), seed=0)
    assert_language_model(model)
    assert_positions_count_up(model)
    assert_wrapping_is_right(
        model, ReLoRAConfig(r=4, lora_alpha=4, exclude_modules=exclude or None), LEFT_OUT.get(variant, [])
    )


def small_configuration(variant: str) -> PretrainedConfig:
    config = CONFIG_MAPPING[variant.removesuffix(" as decoder")](**VARIANTS[variant])
    try:
        return tiny_config(config)
    except ValueError:  # it cannot be built at all, and is to be refused
        return config


def follow_remedies(directory: Path) -> tuple[str, list[str], list[str]]:
    """Do what refusals say of attention and of modules; return both settings and the refusals that remain."""
    attention, exclude = "sdpa", []
    while True:
        found, before = refusals(directory, attention, exclude), (attention, len(exclude))
        for problem in found:
            if problem.startswith("model.attn_implementation: sdpa is not"):
                attention = "eager"
            if remedy := re.search(r"relora\.exclude_modules=\[(.*?)\]", problem):
                exclude += [name for name in remedy[1].split(", ") if name not in exclude]
        if (attention, len(exclude)) == before:
            return attention, exclude, found


def tokens() -> torch.Tensor:
    return torch.randint(5, 240, (4, 32), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def assert_language_model(model: PreTrainedModel) -> None:
    """Assert that it predicts each token from those before it, and that its loss is evaluation's."""
    ids = tokens()
    for mode in (True, False):
        output = run(model.train(mode), ids)
        expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5), "training and evaluation loss differ"
    changed = ids.clone()
    changed[:, -1] = (ids[:, -1] + 7) % 240
    assert difference(output.logits[:, :-1], run(model, changed).logits[:, :-1]) < 1e-5, "it sees later tokens"


@torch.no_grad()
def assert_positions_count_up(model: PreTrainedModel) -> None:
    """Assert that rows without positions are one document each, whatever their tokens (see zero/attention_mask.py)."""
    ids, found = tokens(), []
    special = [getattr(model.config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
    for place, token in enumerate(token for token in special if isinstance(token, int) and 0 <= token < 240):
        ids[:, 5 * place : 5 * place + 2] = ids[:, -2:] = token
    search = inspect.unwrap(masking_utils.find_packed_sequence_indices)
    with mock.patch.object(
        masking_utils, "find_packed_sequence_indices", lambda positions: found.append(search(positions))
    ):
        model(input_ids=ids)
    assert all(documents is None for documents in found), "it counts positions anew within a row"


def assert_wrapping_is_right(model: PreTrainedModel, config: ReLoRAConfig, left_out: list[str]) -> None:
    ids, generator = tokens(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():  # some start at 0, and let no gradient through
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        before = run(model.eval(), ids).logits

    layers = lowrank_layers(wrap(model, config))
    assert_left_out(model, left_out)
    run(model.train(), ids).loss.backward()
    untrained = [name for name, layer in layers.items() if layer.lora_B.grad is None or not layer.lora_B.grad.any()]
    assert layers and untrained == []

    with torch.no_grad():
        assert difference(before, run(model.eval(), ids).logits) < 1e-5
        for layer in layers.values():
            layer.lora_B.normal_(std=0.01, generator=generator)
        live = run(model, ids)
        assert difference(before, live.logits) > 1e-3
        merged = run(merge_and_unwrap(model), ids)
    assert difference(live.logits, merged.logits) < 2e-5
    assert live.loss.item() == pytest.approx(merged.loss.item(), rel=2e-5)


def test_the_lists_name_families_that_there_are():
    assert set(REFUSED) | set(LEFT_OUT) <= set(VARIANTS)
    assert not set(REFUSED) & set(LEFT_OUT)
    assert set(CHANGES) <= set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
