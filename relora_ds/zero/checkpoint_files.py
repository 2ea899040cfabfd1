"""The fp32 masters of the frozen weights beside DeepSpeed's own checkpoint files.

Without them a resumed run is exact only until its next restart, which would merge into a truncated
weight. One safetensors file per rank, in the checkpoint's tag directory; whole tensors under their names,
so that any number of ranks can read them.
"""

import os
from pathlib import Path

import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file

from relora_ds.zero.frozen_master import FrozenWeights

_PATTERN = "relora_frozen_masters_{rank:05d}.safetensors"


def save_frozen(save_dir: str, tag: str, frozen: FrozenWeights) -> None:
    """Write this rank's masters into `save_dir/tag` (nothing to write where weights are stored in fp32)."""
    if not frozen.with_masters:
        return
    directory = Path(save_dir) / tag
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / _PATTERN.format(rank=dist.get_rank())
    temporary = path.with_suffix(".tmp")
    save_file(frozen.masters, temporary)
    os.replace(temporary, path)


def load_frozen(load_dir: str, tag: str | None, frozen: FrozenWeights) -> None:
    """Read the masters that this rank owns, from whichever file holds them.

    Raises:
        ValueError: when a master is missing: the checkpoint was written without them.
    """
    if not frozen.with_masters:
        return
    if tag is None:
        tag = (Path(load_dir) / "latest").read_text().strip()
    wanted = set(frozen.owned())
    for path in sorted((Path(load_dir) / str(tag)).glob("relora_frozen_masters_*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in wanted & set(file.keys()):
                frozen.masters[name].copy_(file.get_tensor(name))
                wanted.discard(name)
    if wanted:
        raise ValueError(f"load_checkpoint: {Path(load_dir) / str(tag)} has no fp32 master of the frozen weight "
                         f"{sorted(wanted)[0]} ({len(wanted)} missing); the next restart would merge into a truncated "
                         "weight. Use a checkpoint that this engine's save_checkpoint wrote")
