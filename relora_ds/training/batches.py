"""The batches that this rank trains on."""

from typing import Any

import torch.distributed as dist

from relora_ds.data import Prefetched, TrainLoader
from relora_ds.training.preflight import Plan
from relora_ds.zero.accelerator import is_cuda


def train_batches(plan: Plan, state: dict[str, Any] | None) -> Prefetched:
    """Return the batches from `state` (a loader's `state_dict`) on, or all; made ahead where a GPU computes."""
    recipe, data = plan.recipe, plan.data
    loader = TrainLoader(
        data.train if data.weights is None else data.trains(),
        recipe.data.seq_len,
        recipe.batch_sequences,
        recipe.train.micro_batch_size,
        dist.get_rank(),
        dist.get_world_size(),
        recipe.seed,
        data.layout,
        recipe.islands.index,
        recipe.islands.count or 1,
        data.weights,
    )
    if state is not None:
        loader.load_state_dict(state)
    return Prefetched(loader, ahead=is_cuda(), pin=is_cuda())
