"""The plain model inside an engine: every weight in fp32, updates merged, under the names of an unwrapped model.

The switch from the warm start, the export and `save_merged` all start from here.
"""

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from torch import Tensor, nn

from relora_ds.lowrank.frozen import add_update_
from relora_ds.lowrank.wrap import is_lora_parameter, lowrank_layers
from relora_ds.zero.frozen_master import FrozenWeights, is_partitioned
from relora_ds.zero.plain_model import persistent_buffers
from relora_ds.zero.shards import ShardView


@torch.no_grad()
def collect_merged(module: nn.Module, shards: ShardView, frozen: FrozenWeights, *, device: torch.device,
                   dst: int | None = None) -> dict[str, Tensor]:
    """`{parameter name: fp32 CPU tensor}` of the merged model, from the masters. Collective; nothing is changed.

    Persistent buffers are in it too.

    Args:
        dst: the one rank that gets it (the others get {}), or None for every rank.
    """
    here = dst is None or dist.get_rank() == dst
    state: dict[str, Tensor] = {}

    for name, parameter in module.named_parameters():
        if is_lora_parameter(name) or name.removesuffix(".weight") in frozen.layers:
            continue
        if parameter.requires_grad:
            value = shards.gather([name], dst=dst).get(name)
        else:
            with GatheredParameters([parameter], enabled=is_partitioned(parameter)):
                value = parameter.detach().to("cpu", torch.float32, copy=True)
        if here:
            state[name] = value.to("cpu", copy=True)

    for name, buffer in persistent_buffers(module).items():
        if here:
            state[name] = buffer.to("cpu", torch.float32 if buffer.is_floating_point() else buffer.dtype, copy=True)

    for name, layer in lowrank_layers(module).items():
        merged = _merged(name, layer, shards, frozen, device, dst)
        if here:
            state[f"{name}.weight"] = merged.cpu()
    return state


def _merged(name: str, layer, shards: ShardView, frozen: FrozenWeights, device: torch.device,
            dst: int | None) -> Tensor | None:
    """The merged weight of one layer, fp32 on `device`; None on ranks that are not asked for it."""
    owner = frozen.owners.get(name, dst)
    pair = shards.gather([f"{name}.lora_A", f"{name}.lora_B"], dst=owner)
    if name in frozen.layers:
        base = frozen.read(name, device)
    else:  # no base: y = s·B·A·x
        base = torch.zeros(layer.out_features, layer.in_features, device=device) if pair else None
    if base is not None:
        add_update_(base, pair[f"{name}.lora_A"], pair[f"{name}.lora_B"], layer.scaling)
    if name not in frozen.layers:
        return base
    if dst is None or owner != dst:
        # dst=None: everybody needs it. Otherwise one rank does, and a broadcast is still the one way that
        # every backend knows; this runs at the end of a run, not in the loop.
        if base is None:
            base = torch.empty(layer.out_features, layer.in_features, device=device)
        dist.broadcast(base, owner)
    return base
