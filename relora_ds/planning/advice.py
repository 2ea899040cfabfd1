"""Which stage, r and micro-batch suit a recipe on this machine and the link that was measured."""

import dataclasses
import os
from typing import cast

import torch
import torch.distributed as dist
from transformers import PretrainedConfig, PreTrainedModel

from relora_ds.config import Recipe, RecipeError
from relora_ds.lowrank.formats import DTYPES
from relora_ds.lowrank.gradient_sum import GradientSum
from relora_ds.lowrank.wrap import owned_layers
from relora_ds.methods import Method, full_rank, method_of
from relora_ds.models import recompute
from relora_ds.models.loading import from_config
from relora_ds.planning.activations import prepared_config
from relora_ds.planning.cost import activations_of, cost
from relora_ds.planning.device_memory import HOST, KEPT, peak, total
from relora_ds.planning.link import (
    Candidate,
    Link,
    flops_per_token,
    micro_batches_to_try,
    predict,
    ranks_to_try,
    recommend,
    seconds_per_token,
)
from relora_ds.planning.network import network_of, shapes_of
from relora_ds.planning.planned_storage import format_here
from relora_ds.training.preflight import Resolved

USABLE = 0.9  # of a device's memory: the rest is the allocator's and the libraries'
MEASURED_MICRO_BATCH = 4


@dataclasses.dataclass(frozen=True)
class Advice:
    """Attributes: best: the candidate to take, or None where nothing fits; candidates: all, and full rank's."""

    best: Candidate | None
    candidates: list[Candidate]
    full_rank: list[Candidate]
    available: float
    seconds_per_token: float


def advise(resolved: Resolved, link: Link, device: torch.device) -> Advice:
    """Measure the network's compute, and predict every stage, r and micro-batch. Collective."""
    recipe, world_size = resolved.recipe, dist.get_world_size()
    config, _ = network_of(recipe)
    micro_batches = micro_batches_to_try(recipe.batch_sequences, world_size)
    if not micro_batches:
        raise RecipeError(
            [
                f"train.batch_sequences: {recipe.batch_sequences} cannot be split over {world_size} ranks; "
                f"use a multiple of {world_size}"
            ]
        )
    method = method_of(recipe)
    measured = _measured_seconds(method, config, resolved, device)
    reference = flops_per_token(shapes_of(method, config), config, recipe.data.seq_len)
    available = _available_memory(device)

    def candidates(variant: Recipe, method: Method, r: int | None) -> list[Candidate]:
        shapes = shapes_of(method, config)
        first, second = (activations_of(resolved, method, config, size) or 0 for size in (1, 2))
        found = []
        for stage in range(4):
            for size in micro_batches:
                changed = dataclasses.replace(
                    resolved,
                    recipe=dataclasses.replace(
                        variant, train=dataclasses.replace(variant.train, micro_batch_size=size)
                    ),
                )
                result = cost(changed, method, config, stage=stage, world_size=world_size, shapes=shapes)
                held = peak(result.items, first + (size - 1) * (second - first))
                if device.type == "cpu":
                    held += total(result.items, HOST, KEPT)
                assert result.step is not None  # the recipe's batch was accepted
                found.append(
                    predict(
                        stage=stage,
                        r=r,
                        micro_batch_size=size,
                        memory=held,
                        wire=result.step[1],
                        tokens_per_step=recipe.tokens_per_step,
                        world_size=world_size,
                        bandwidth=link.wire_per_second(stage),
                        seconds_per_token=measured * flops_per_token(shapes, config, recipe.data.seq_len) / reference,
                    )
                )
        return found

    own = []
    for r in ranks_to_try(recipe.relora.r) if method.is_low_rank else [None]:
        variant = recipe if r is None else dataclasses.replace(recipe, relora=dataclasses.replace(recipe.relora, r=r))
        own += candidates(variant, method_of(variant), r)
    full = candidates(recipe, full_rank(recipe), None)
    return Advice(recommend(own, available), own, full, available, measured)


def _measured_seconds(method: Method, config: PretrainedConfig, resolved: Resolved, device: torch.device) -> float:
    recipe = resolved.recipe
    config = prepared_config(method, config)
    format, dtype = format_here(method.relora, resolved.precision, resolved.stage), DTYPES[resolved.precision]

    def build(shallow: PretrainedConfig) -> torch.nn.Module:
        model = from_config(shallow, dtype=dtype, attn_implementation=recipe.model.attn_implementation)
        prepared: torch.nn.Module = model if method.relora is None else method.prepare(model)
        prepared.to(device)
        for layer in owned_layers(prepared).values():
            if layer.weight is not None:
                weight = layer.weight
                assert isinstance(weight, torch.Tensor)
                layer.store_weight(format.quantize(weight.detach().float(), dtype), format, as_buffer=False)
                if method.has_owners:
                    layer.gradient_sum = GradientSum(layer.shape_of_gradient, device)
        return recompute.apply(cast(PreTrainedModel, prepared), recipe.activation_checkpointing)

    return seconds_per_token(
        build,
        config,
        device,
        seq_len=recipe.data.seq_len,
        micro_batch_size=min(MEASURED_MICRO_BATCH, recipe.train.micro_batch_size),
    )


def _available_memory(device: torch.device) -> float:
    if device.type == "cuda":
        return USABLE * torch.cuda.get_device_properties(device).total_memory
    here = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    return USABLE * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / here
