"""What a wrapped model consists of, and what of it trains."""

import torch
from torch import nn

from relora_ds.lowrank.base_layer import LowRankLayer
from relora_ds.lowrank.owned_layer import OwnedLayer


def owned_layers(model: nn.Module) -> dict[str, OwnedLayer]:
    """Return the wrapped layers by module name, in the model's order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, OwnedLayer)}


def lowrank_layers(model: nn.Module) -> dict[str, LowRankLayer]:
    """Return those of them that have factors."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLayer)}


def full_shape(parameter: nn.Parameter) -> torch.Size:
    """Return the parameter's shape, also while ZeRO-3 has it partitioned."""
    return getattr(parameter, "ds_shape", parameter.shape)


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """`(trainable, all)` weights; shared parameters count once.

    However they are kept: partitioned by ZeRO-3, packed into bytes, or as a buffer, a weight is one weight.
    """
    layers = [layer for layer in owned_layers(model).values() if layer.weight is not None]
    bases = [layer for layer in lowrank_layers(model).values() if layer.one_sided]
    stored = {id(layer.weight) for layer in layers} | {id(layer.lora_A) for layer in bases}
    sizes = [(p.requires_grad, full_shape(p).numel()) for p in model.parameters() if id(p) not in stored]
    sizes += [(not isinstance(layer, LowRankLayer), layer.weight_shape.numel()) for layer in layers]
    sizes += [(False, layer.shape_of_A.numel()) for layer in bases]
    return sum(n for trains, n in sizes if trains), sum(n for _, n in sizes)


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict]:
    """Optimizer groups: LoRA factors, other matrices, and norms and biases (no weight decay).

    Decoupled weight decay of `ρ·W + s·B·A` scales ρ, which the engine does, and B; not A as well, or the update would
    decay twice. With weight decay A so has a group of its own.

    The LoRA factors have groups of their own because Adam's step is one scalar per ZeRO partition.
    Groups without parameters are left out (an empty one breaks DeepSpeed's scheduler).
    """
    decay = {"lora": weight_decay, "lora_A": 0.0, "matrices": weight_decay, "vectors": 0.0}
    members: dict[str, list[nn.Parameter]] = {group: [] for group in decay}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            group = _group_of(name, parameter)
            members["lora_A" if weight_decay and name.endswith(".lora_A") else group].append(parameter)
    return [
        {"name": group, "params": params, "weight_decay": decay[group]} for group, params in members.items() if params
    ]


def print_trainable_parameters(model: nn.Module) -> None:
    """Print how many weights train, in PEFT's words; a packed or partitioned weight counts as one weight each."""
    trainable, total = count_parameters(model)
    print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")


def is_lora_parameter(name: str) -> bool:
    """Return whether a parameter's name is that of a low-rank factor."""
    return name.rsplit(".", 1)[-1] in ("lora_A", "lora_B")


def _group_of(name: str, parameter: nn.Parameter) -> str:
    if is_lora_parameter(name):
        return "lora"
    return "matrices" if len(full_shape(parameter)) >= 2 else "vectors"


def plain_parameters(model: nn.Module) -> list[tuple[list[str], nn.Parameter]]:
    """Return `(names, parameter)` of a model, wrapped or not; a tied parameter has several names.

    The weights of wrapped layers have the names that they have in the plain model.
    """
    plain = {f"{name}.weight": layer.plain_name(name) for name, layer in owned_layers(model).items()}
    names: dict[int, list[str]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(plain.get(name, name))
        parameters[id(parameter)] = parameter
    return [(names[key], parameter) for key, parameter in parameters.items()]
