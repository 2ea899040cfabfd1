"""The frozen weights of an engine, to be written and read again: whole tensors, each by its owner.

They change at restarts only. Their names are in `checkpoint.contents`.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from torch import Tensor

from relora_ds.checkpoint.contents import INTENDED, LOST, OTHER, STORED
from relora_ds.lowrank.storage import Storage
from relora_ds.zero.frozen_master import is_partitioned
from relora_ds.zero.partitions import write_partition

Read = Callable[[str], Tensor]  # the tensor of that name in a checkpoint


@torch.no_grad()
def frozen_state(engine) -> dict[str, Tensor]:
    """Return what this rank has to write, on the CPU; later steps do not change it. Collective."""
    frozen, host = engine.frozen, torch.device("cpu")
    state = {f"{name}.weight": master.to(host) for name, master in frozen.masters.hold().items()}
    for name, layer in frozen.layers.items():
        mine = frozen.owners[name] == dist.get_rank()
        if frozen.with_masters:
            continue
        if frozen.storage.exact:
            if (value := frozen.read(name, host)) is not None:
                state[f"{name}.weight"] = value
        else:
            with GatheredParameters([layer.weight], enabled=is_partitioned(layer.weight)):
                if mine:
                    state[f"{STORED}{name}.weight"] = layer.weight.detach().to(host, copy=True)
    for name, ledger in frozen.ledgers.items():
        state |= {INTENDED + name: ledger.intended.clone(), LOST + name: ledger.lost.clone()}
    for name in frozen.one_sided:
        lora_A = frozen.read_A(name)
        if frozen.owners[name] == dist.get_rank():
            state[f"{OTHER}{name}.lora_A"] = lora_A.to(host)
    for name, parameter in other_parameters(engine):
        with GatheredParameters([parameter], enabled=is_partitioned(parameter)):
            if dist.get_rank() == 0:
                state[OTHER + name] = parameter.detach().to(host, copy=True)
    return state


@torch.no_grad()
def restore_frozen_state(engine, read: Read, saved: Storage, *, with_bases: bool = True) -> None:
    """Take over what `frozen_state` returned, in an engine that may store it otherwise. Collective.

    Args:
        saved: how the weights were stored. Without fp32 values it must be as they are stored now.
        with_bases: also the A's of one-sided layers.
    """
    frozen = engine.frozen
    engine.shards.drop_gathered_copies()
    in_fp32 = saved.with_masters or saved.exact
    assert in_fp32 or saved.same_bytes(frozen.storage)
    for name, owner in frozen.owners.items():  # one at a time: there is no second copy of them all
        mine = owner == dist.get_rank()
        if in_fp32:
            frozen.take(name, read(f"{name}.weight") if mine else None)
        else:
            stored = read(f"{STORED}{name}.weight").to(frozen.device) if mine else None
            frozen.publish(name, stored, frozen.device)
            if mine and frozen.with_masters:  # they begin with all that is left
                frozen.keep(name, frozen.dequantize(name, stored))
    for name, ledger in frozen.ledgers.items():
        ledger.clear()
        if saved.rounds_like(frozen.storage):  # else what was lost then is not what is lost now
            ledger.intended.copy_(read(INTENDED + name))
            ledger.lost.copy_(read(LOST + name))
    for name in frozen.one_sided if with_bases else ():
        mine = frozen.owners[name] == dist.get_rank()
        frozen.publish_A(name, read(f"{OTHER}{name}.lora_A") if mine else None)
    for name, parameter in other_parameters(engine):  # rank 0 reads them
        shape = parameter.ds_shape if is_partitioned(parameter) else parameter.shape
        value = torch.empty(shape, dtype=parameter.dtype, device=engine.device)
        if dist.get_rank() == 0:
            value.copy_(read(OTHER + name))
        dist.broadcast(value, 0)
        if is_partitioned(parameter):
            write_partition(parameter, value)
        else:
            parameter.data.copy_(value)


def other_parameters(engine):
    """Frozen parameters that are no low-rank layer's."""
    of_layers = {f"{name}.{part}" for name in engine.frozen.layers for part in ("weight", "lora_A")}
    return [(name, p) for name, p in engine.module.named_parameters() if not p.requires_grad and name not in of_layers]
