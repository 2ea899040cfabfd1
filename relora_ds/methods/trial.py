"""Wrapped layers tried on a small copy: the same function, gradients, merging, stored weights."""

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.formats import DENSE, format_of
from relora_ds.lowrank.gradient_sum import GradientSum
from relora_ds.lowrank.inventory import owned_layers
from relora_ds.lowrank.wrap import lowrank_layers, merge_and_unwrap, wrap_quietly
from relora_ds.methods.small_copy import distance, first_line, run, tokens

SAME = 2e-5  # of logits, relative, in fp32; rounding alone gives 5e-7 in a LLaMA and 1e-5 in a Gemma 4
_MAX_BATCHES = 4  # until every routed expert has had a token
_SAME_GRADIENT = 1e-3  # relative, in fp32
NO_GRADIENT = "would not train: no gradient reaches it (it is not called, or its result is not used)"
NOT_ALL_OF_IT = "would be trained by a part of its gradient (the model reads the weight without calling the layer)"


class Trial:
    """Wraps copies of the small model and compares them with it."""

    def __init__(self, model: PreTrainedModel, relora: ReLoRAConfig, base: bool, precision: str):
        self.model, self.relora, self.base, self.precision = model, relora, base, precision
        self._modules = dict(model.named_modules(remove_duplicate=False))

    def faults(self, names: list[str]) -> dict[str, str]:
        """Return `{name: reason}` for the linears and parameters in `names` that cannot be wrapped."""
        parameters = [name for name in names if self.is_parameter(name)]
        targets = dataclasses.replace(
            self.relora,
            target_modules=[name for name in names if name not in parameters],
            target_parameters=parameters or None,
        )
        ids = tokens(self.model, 0)
        with torch.no_grad():
            plain = run(self.model, ids).logits
        try:
            model = wrap_quietly(copy.deepcopy(self.model), targets, base=self.base)
            if self.base:
                with torch.no_grad():
                    if not distance(plain, run(model, ids).logits) <= SAME:
                        return dict.fromkeys(names, "changes the model's function when it is wrapped")
            if untrained := _without_gradient(model):
                return dict.fromkeys(untrained, NO_GRADIENT)
            if self.relora.trains == "none" and (partly := _without_all_of_it(copy.deepcopy(self.model), model)):
                return dict.fromkeys(partly, NOT_ALL_OF_IT)
            with torch.no_grad():
                return self._merge_faults(model, ids, names)
        except Exception as error:  # whatever the code of a family raises
            return dict.fromkeys(names, f"fails when it is wrapped ({first_line(error)})")

    def is_parameter(self, name: str) -> bool:
        """Return True if a target is no linear."""
        return name not in self._modules

    def _merge_faults(self, model: nn.Module, ids: Tensor, names: list[str]) -> dict[str, str]:
        layers = lowrank_layers(model)
        for layer in layers.values():
            nn.init.normal_(layer.lora_B, std=0.01)
        live = run(model, ids).logits
        merged = merge_and_unwrap(copy.deepcopy(model))
        if not distance(live, run(merged, ids).logits) <= SAME:
            return dict.fromkeys(names, "is another function when it is merged")
        format = format_of(self.relora.frozen_dtype, self.precision) if self.base else DENSE
        if format is DENSE or format.unavailable():
            return {}
        layers = {name: layer for name, layer in layers.items() if not format.problem(layer.weight_shape)}
        weights: dict[str, Any] = {name: layer.weight for name, layer in layers.items()}
        stored = {name: format.quantize(weight.detach(), torch.float32) for name, weight in weights.items()}
        for name, layer in layers.items():
            weights[name].copy_(format.dequantize(stored[name], layer.weight_shape, torch.float32))
        dense = run(model, ids).logits
        for name, layer in layers.items():
            layer.store_weight(stored[name], format, as_buffer=True)
        if not distance(dense, run(model, ids).logits) <= SAME:
            return dict.fromkeys(names, f"is another function with relora.frozen_dtype {self.relora.frozen_dtype}")
        return {}


def _without_gradient(model: Any) -> list[str]:
    """Return the wrapped layers that get no gradient. An expert without a token goes by the others of its kind."""
    layers, missing = owned_layers(model), []
    for layer in layers.values():
        layer.gradient_sum = None if hasattr(layer, "lora_B") else GradientSum(layer.shape_of_gradient)
    for number in range(_MAX_BATCHES):
        _backward(model, number)
        missing = [name for name, layer in layers.items() if not _has_gradient(layer)]
        if not missing:
            break
    trains = {_without_experts(name) for name in layers.keys() - set(missing)}
    return [name for name in missing if "expert" not in name or _without_experts(name) not in trains]


def _has_gradient(layer: Any) -> bool:
    gradient = layer.lora_B.grad if layer.gradient_sum is None else layer.gradient_sum.values
    return gradient is not None and bool(gradient.any())


def _without_all_of_it(plain: Any, model: Any) -> list[str]:
    """Return the layers whose owners get another gradient than autograd has of the same weight in the plain model."""
    layers, sums = owned_layers(model), {}
    for name, layer in layers.items():
        layer.gradient_sum = sums[name] = GradientSum(layer.shape_of_gradient)
    for one in (plain, model):
        _backward(one, 0)
    found = []
    for name, layer in layers.items():
        whole = plain.get_parameter(layer.plain_name(name)).grad
        whole = torch.zeros(layer.weight_shape) if whole is None else whole
        whole = whole.mT if layer.transposed else whole
        if not (sums[name].values - whole).norm() <= _SAME_GRADIENT * whole.norm():
            found.append(name)
    return found


def _backward(model: Any, number: int) -> None:
    """Run a batch through a model as it trains, with the same random numbers for the same `number`."""
    torch.default_generator.manual_seed(number)
    ids = tokens(model, number)
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    model.eval()


def _without_experts(name: str) -> str:
    head, experts, rest = name.partition("experts.")
    return head + experts + rest.partition(".")[2]
