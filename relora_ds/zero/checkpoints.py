"""Checkpoints of an engine: `checkpoint.writer` with what only an engine knows."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

from relora_ds.checkpoint.manifest import Manifest
from relora_ds.checkpoint.sharing import Sharing
from relora_ds.checkpoint.writer import CheckpointWriter
from relora_ds.zero.capture import EngineSource
from relora_ds.zero.start import host_group


def writer_of(
    engine,
    directory: Path,
    after: Callable[[], None] = lambda: None,
    continues: tuple[Path, Manifest] | None = None,
    sharing: Sharing | None = None,
) -> CheckpointWriter:
    """Make the writer of an engine's checkpoints in `directory`. Collective.

    Args:
        after, sharing: see `CheckpointWriter`.
        continues: the checkpoint that the engine was restored from.
    """
    if continues is not None and not _same_content(continues[1], engine):
        continues = None
    return CheckpointWriter(EngineSource(engine), directory, host_group(), after, continues, sharing)


def _same_content(about: Manifest, engine) -> bool:
    """Return True if the frozen files of a checkpoint are what the engine would write now."""
    saved, now = about.model["frozen"], dataclasses.asdict(engine.frozen.storage)
    in_fp32 = [content["with_masters"] or content["dtype"] == "fp32" for content in (saved, now)]
    return about.model["restarts"] == len(engine.restarts) and (all(in_fp32) or saved == now)
