"""The fp32 masters of the frozen weights beside DeepSpeed's own checkpoint files.

Without them a resumed run is exact only until its next restart, which would merge into a truncated
weight. One safetensors file per rank, in the checkpoint's tag directory; whole tensors under their names,
so that any number of ranks can read them.
"""

import logging
import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from relora_ds.zero.frozen_master import FrozenWeights

logger = logging.getLogger(__name__)

_PATTERN = "relora_frozen_masters_{rank:05d}.safetensors"
MASTERS_GLOB = "relora_frozen_masters_*.safetensors"


def save_frozen(save_dir: str, tag: str, frozen: FrozenWeights) -> None:
    """Write this rank's masters into `save_dir/tag` (nothing to write where weights are stored in fp32)."""
    if not frozen.with_masters:
        return
    directory = Path(save_dir) / tag
    directory.mkdir(parents=True, exist_ok=True)
    if dist.get_rank() == 0:
        for old in directory.glob(MASTERS_GLOB):
            old.unlink()  # of a larger world: a stale master must never be found
    dist.barrier()
    path = directory / _PATTERN.format(rank=dist.get_rank())
    temporary = path.with_suffix(".tmp")
    save_file(frozen.masters, temporary)
    os.replace(temporary, path)


def newest_tag(load_dir: str) -> str | None:
    """What `latest` names where rank 0 looks, for every rank: DeepSpeed writes it on one machine only. Collective."""
    latest = Path(load_dir) / "latest"
    tag = [latest.read_text().strip() if dist.get_rank() == 0 and latest.is_file() else None]
    dist.broadcast_object_list(tag, 0)
    return tag[0]


def read_frozen(load_dir: str, tag: str, frozen: FrozenWeights, device: torch.device) -> dict[str, Tensor]:
    """The masters that this rank owns, from whichever file holds them. Collective.

    Raises:
        ValueError: on every rank, when a master is missing: the checkpoint was written without them, or a file of
            them cannot be read.
    """
    if not frozen.with_masters:
        return {}
    wanted, found = set(frozen.owned()), {}
    for path in sorted((Path(load_dir) / tag).glob(MASTERS_GLOB)):
        try:
            with safe_open(path, framework="pt") as file:
                found |= {name: file.get_tensor(name) for name in wanted & set(file.keys())}
        except (OSError, SafetensorError) as error:  # not raised: the other ranks would wait
            logger.error("load_checkpoint: %s cannot be read: %s", path, error)
    missing = torch.tensor(len(wanted - set(found)), device=device)
    dist.all_reduce(missing)
    if missing:
        raise ValueError(f"load_checkpoint: {Path(load_dir) / tag} lacks the fp32 masters of {missing.item()} "
                         "frozen weights; the next restart would merge into truncated ones. Use a checkpoint that this "
                         "engine's save_checkpoint wrote")
    return found
