"""All weights in a checkpoint, as one process reads them."""

from pathlib import Path

from torch import Tensor

from relora_ds.checkpoint.model import CheckpointWeights


def weights_in(checkpoint: Path, updates: bool = True) -> dict[str, Tensor]:
    """Read the plain model. updates: `W + s·B·A` for the low-rank layers, not `W`."""
    weights = CheckpointWeights(checkpoint, updates)
    return {name: weights.read(name) for name in weights.shapes}
