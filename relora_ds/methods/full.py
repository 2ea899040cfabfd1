"""Ordinary training of every weight: the paper's full-rank baseline, and the warm start."""

from relora_ds.methods.base import TrainingMethod


class Full(TrainingMethod):
    """Everything trains."""

    name = "full"
