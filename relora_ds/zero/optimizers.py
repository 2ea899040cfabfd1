"""The optimizer that an engine steps: AdamW, with moments in fp32 or in 8 bit.

Of the two kept libraries with an 8-bit AdamW, bitsandbytes is used. It steps tensors of any length, on CPUs too, where
torchao needs a compiler and keeps fp32 moments unless 256 divides the length, which those of ZeRO's partitions seldom
allow.
"""

import importlib.util
from collections.abc import Mapping
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from relora_ds.lowrank.base_layer import LowRankLayer
from relora_ds.lowrank.inventory import full_shape
from relora_ds.utils.versions import version_of
from relora_ds.zero.moment_codes import BLOCK
from relora_ds.zero.vectors import VectorAdamW

NAMES = ("adamw", "adamw_8bit")
OLDEST = "0.50"  # bitsandbytes' first version that steps 8-bit moments on CPUs: those of an offloaded optimizer
LARGEST = 2**31 - 1  # elements that bitsandbytes' CUDA kernels can count
_SHORTEST = 4096  # elements that are quantized at least: bitsandbytes' default


def unavailable(name: str) -> str | None:
    """Return why an optimizer cannot be used here, with the remedy; None where it can."""
    if name != "adamw_8bit":
        return None
    remedy = 'pip install ".[quantization]", or use adamw'
    if importlib.util.find_spec("bitsandbytes") is None:
        return f"{name} needs bitsandbytes; {remedy}"
    if Version(installed := version_of("bitsandbytes") or "0") < Version(OLDEST):
        return f"{name} needs bitsandbytes {OLDEST} or newer, and {installed} is installed; {remedy}"
    try:
        from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib  # noqa: PLC0415
    except Exception as error:  # whatever a broken installation raises
        return f"{name} needs bitsandbytes, which cannot be imported ({error}); {remedy}"
    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        return f"{name} needs bitsandbytes, whose library cannot be loaded; install the one for this CUDA, or use adamw"
    return None


def partition_problem(name: str, groups: list[dict[str, Any]], zero: dict[str, Any], world_size: int) -> str | None:
    """Return why an optimizer cannot step a rank's partitions; None where it can.

    Args:
        groups: the model's parameter groups.
        zero: the `zero_optimization` section of a DeepSpeed configuration.
    """
    if name != "adamw_8bit":
        return None
    sizes, stage = [[full_shape(p).numel() for p in group["params"]] for group in groups], zero.get("stage", 0)
    largest = max(map(max, sizes)) if stage == 0 else max(map(sum, sizes)) // world_size
    if stage == 3 or largest <= LARGEST:  # at stage 3 DeepSpeed cuts what a rank has into pieces of 1e9 elements
        return None
    return (
        f"{name} steps {LARGEST:,} elements at once at most, and at ZeRO stage {stage} a partition on each of "
        f"{world_size} rank(s) has {largest:,}; use stage 3, more ranks, or adamw"
    )


def groups_for(name: str, groups: list[dict[str, Any]], model: nn.Module) -> list[dict[str, Any]]:
    """Return the parameter groups as an optimizer gets them.

    In 8 bit, embeddings have groups of their own, under the same names, and keep fp32 moments, as bitsandbytes advises:
    rows of rare tokens have no gradient in most steps, and where a small second moment has been rounded to 0 such a
    step would be the first moment / eps long.
    """
    if name != "adamw_8bit":
        return groups
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    split = [
        {**group, "params": [p for p in group["params"] if (id(p) in looked_up) == whole], "optim_bits": bits}
        for group in groups
        for whole, bits in ((True, 32), (False, 8))
    ]
    return [group for group in split if group["params"]]


def decayed_group(groups: list[dict[str, Any]], layers: Mapping[str, LowRankLayer]) -> int | None:
    """Return the index of the group whose weight decay acts on the frozen weights, that of `lora_B`; None without.

    Args:
        groups: of an optimizer.
        layers: the low-rank ones, by name.

    Raises:
        ValueError: A decays too, so that `B·A` would decay twice; or the groups of B differ.
    """

    def holding(factor: str) -> list[int]:
        factors = {id(getattr(layer, factor)) for layer in layers.values()}
        return [i for i, group in enumerate(groups) if any(id(p) in factors for p in group["params"])]

    for i in holding("lora_A"):
        if decay := groups[i]["weight_decay"]:
            raise ValueError(
                f"param_groups: group {i} has weight_decay {decay} and lora_A, so that lora_B @ lora_A would decay "
                "twice; put all lora_A into a group with weight_decay=0, or leave out param_groups"
            )
    found = holding("lora_B")
    if len({(groups[i]["lr"], groups[i]["weight_decay"]) for i in found}) > 1:
        raise ValueError(
            f"param_groups: lora_B is in {len(found)} groups of different lr or weight_decay, and the frozen weights "
            "decay as one; put all lora_B into one group"
        )
    return next((i for i in found if groups[i]["weight_decay"]), None)


def moment_bytes(numel: int) -> int:
    """Return the bytes of both moments of a tensor of an 8-bit group: codes, and an fp32 scale a block, or fp32."""
    return 8 * numel if numel < _SHORTEST else 2 * (numel + 4 * -(-numel // BLOCK))


def make_optimizer(
    name: str,
    groups: list[dict[str, Any]],
    model: nn.Module,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    by_vector: bool = False,
) -> torch.optim.Optimizer:
    """Return the optimizer `name`, one of `NAMES`, of the model's parameter groups.

    by_vector: an AdamW that can count steps by vector.
    """
    values: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
    if by_vector:
        assert name == "adamw"
        return VectorAdamW(groups, fused=True, **values)
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True, **values)
    return _adamw_8bit()(groups_for(name, groups, model), **values)


def _adamw_8bit() -> type[torch.optim.Optimizer]:
    from bitsandbytes.optim import AdamW8bit  # noqa: PLC0415 (an extra)

    class GroupedAdamW8bit(AdamW8bit):
        """bitsandbytes' AdamW8bit; a group says how many bits its moments have."""

        def get_config(self, gindex, pindex, group):
            return {**super().get_config(gindex, pindex, group), "optim_bits": group["optim_bits"]}

    return GroupedAdamW8bit
