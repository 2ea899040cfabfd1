"""The frozen weights beside DeepSpeed's own checkpoint files.

Without their fp32 masters a resumed run is exact only until its next restart, which would merge into a truncated
weight. One safetensors file per rank, in the checkpoint's tag directory; whole tensors under the layers' names,
so that any number of ranks can read them:

    NAME                    the fp32 master, where there are masters
    stored/NAME             the stored copy, where it is a buffer (DeepSpeed's files hold parameters) without a master
    intended/, lost/NAME    the sums of the merge ledger

An engine that stores its frozen weights otherwise than the checkpoint's takes them from the masters.
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
from relora_ds.zero.together import together

logger = logging.getLogger(__name__)

_PATTERN = "relora_frozen_masters_{rank:05d}.safetensors"
MASTERS_GLOB = "relora_frozen_masters_*.safetensors"
STORED, INTENDED, LOST = "stored/", "intended/", "lost/"


def save_frozen(save_dir: str, tag: str, frozen: FrozenWeights) -> None:
    """Write what this rank owns into `save_dir/tag`. Collective.

    Raises:
        OSError: on every rank, where one of them could not write; what was there before stays.
    """
    if not frozen.layers:
        return
    directory = Path(save_dir) / tag
    path = directory / _PATTERN.format(rank=dist.get_rank())
    temporary = path.with_suffix(".tmp")
    tensors = dict(frozen.masters)
    if frozen.storage.replicated and not frozen.with_masters:
        tensors |= {STORED + name: frozen.layers[name].weight for name in frozen.owned()}
    for name, ledger in frozen.ledgers.items():
        tensors |= {INTENDED + name: ledger.intended, LOST + name: ledger.lost}

    def write() -> None:
        directory.mkdir(parents=True, exist_ok=True)
        save_file(tensors, temporary)

    def take_over() -> None:
        os.replace(temporary, path)
        if dist.get_rank() == 0:
            now = {_PATTERN.format(rank=rank) for rank in range(dist.get_world_size())}
            for old in directory.glob(MASTERS_GLOB):
                if old.name not in now:
                    old.unlink()  # of a larger world: a stale master must never be found

    try:
        together("save_checkpoint", write)
    except OSError:
        temporary.unlink(missing_ok=True)  # the disk may be full
        raise
    together("save_checkpoint", take_over)


def read_owned(directory: Path, frozen: FrozenWeights, prefix: str = "") -> dict[str, Tensor]:
    """`{layer: tensor}` of what this rank owns, from whichever file of a checkpoint holds `prefix + layer`."""
    wanted, found = {prefix + name: name for name in frozen.owned()}, {}
    for path in sorted(directory.glob(MASTERS_GLOB)):
        try:
            with safe_open(path, framework="pt") as file:
                found |= {wanted[key]: file.get_tensor(key) for key in wanted.keys() & set(file.keys())}
        except (OSError, SafetensorError) as error:  # not raised: the other ranks would wait
            logger.error("load_checkpoint: %s cannot be read: %s", path, error)
    return found


def require_all(found: dict[str, Tensor], directory: Path, frozen: FrozenWeights, device: torch.device) -> None:
    """Raise on every rank where one of them lacks a frozen weight that it owns. Collective.

    Raises:
        ValueError: the checkpoint was written without them, or a file of them is missing or cannot be read.
    """
    missing = torch.tensor(len(set(frozen.owned()) - set(found)), device=device)
    dist.all_reduce(missing)
    if missing:
        raise ValueError(
            f"load_checkpoint: {directory} lacks {missing.item()} frozen weights (fp32 masters, or "
            "replicated copies without masters), so merges would be lost. Use a checkpoint that this "
            "engine's save_checkpoint wrote, with its files of all ranks"
        )


def restore_ledgers(directory: Path, frozen: FrozenWeights) -> None:
    """Take over the ledgers of a checkpoint, as far as it has them."""
    intended, lost = (read_owned(directory, frozen, prefix) for prefix in (INTENDED, LOST))
    for name in intended.keys() & lost.keys():
        frozen.ledgers[name].intended.copy_(intended[name])
        frozen.ledgers[name].lost.copy_(lost[name])
