"""Low-rank updates tried on a small copy: the same function, gradients, merging, stored weights."""

import copy
import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.formats import DENSE, format_of
from relora_ds.lowrank.wrap import lowrank_layers, merge_and_unwrap, wrap_quietly
from relora_ds.methods.small_copy import distance, first_line, run, tokens

SAME = 2e-5  # of logits, relative, in fp32; rounding alone gives 5e-7 in a LLaMA and 1e-5 in a Gemma 4
_MAX_BATCHES = 4  # until every routed expert has had a token
NO_GRADIENT = "would not train: no gradient reaches its low-rank update (it is not called, or its result is not used)"


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
    """Return the wrapped layers whose B gets no gradient. An expert without a token goes by the others of its kind."""
    layers, missing = lowrank_layers(model), []
    model.train()
    for number in range(_MAX_BATCHES):
        torch.default_generator.manual_seed(number)
        ids = tokens(model, number)
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
