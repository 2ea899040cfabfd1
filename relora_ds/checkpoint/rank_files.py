"""Write the files of one rank, and see them onto the disk."""

import json
import socket
from pathlib import Path

import torch.distributed as dist
from safetensors.torch import save_file

from relora_ds.checkpoint.contents import RANGES, Captured, Source
from relora_ds.checkpoint.manifest import FROZEN, TRAINED, File
from relora_ds.checkpoint.sharing import Sharing
from relora_ds.utils import files


def write_files(directory: Path, captured: Captured, source: Source, sharing: Sharing) -> dict[str, File]:
    """Write what this rank has into `directory`; return it with sizes and checksums."""
    # Not a shared run directory itself: where that was moved away, another run may begin.
    directory.parent.mkdir(parents=not sharing.is_shared, exist_ok=True)
    directory.mkdir(exist_ok=True)
    rank, written = dist.get_rank(), {}

    def add(name: str) -> None:
        path = directory / name
        files.sync(path)
        written[name] = File(path.stat().st_size, files.sha256(path), socket.gethostname())

    def save(kind: str, tensors: dict, metadata: dict[str, str]) -> None:
        if tensors:
            name = f"{kind}_{rank:05d}.safetensors"
            save_file(tensors, directory / name, metadata)
            add(name)

    save(TRAINED, captured.trained, {RANGES: json.dumps(captured.ranges)})
    if captured.frozen is not None:
        save(FROZEN, captured.frozen, {})
    if sharing.leads:
        for name in source.write_config(directory):
            add(name)
    return written
