"""The rank of what restarts have added up to so far, while a run goes on (`log.update_rank`)."""

import logging
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist

from relora_ds.checkpoint.model import open_model
from relora_ds.lowrank.spectrum import spectrum_of
from relora_ds.zero.engine import ReLoRAEngine

logger = logging.getLogger(__name__)


@torch.no_grad()
def update_ranks(engine: ReLoRAEngine, start: Path) -> dict[str, float] | None:
    """Effective rank of `W - W_start` by layer name, directly after a restart; NaN of a layer too large to tell.

    Collective; every layer's owner decomposes it, one at a time. Takes no memory but one matrix: `W_start` is read from
    the checkpoint `start` of the phase's beginning. None where a rank cannot read that checkpoint.
    """
    layers = engine.frozen.layers
    found = torch.zeros(len(layers), dtype=torch.float64, device=engine.device)
    with ExitStack() as stack:
        try:
            before = stack.enter_context(open_model(start))
        except (OSError, ValueError) as error:
            logger.warning("log.update_rank: %s", error)
            before = None
        can_read = torch.tensor(int(before is not None), device=engine.device)
        dist.all_reduce(can_read, op=dist.ReduceOp.MIN)
        if not can_read:
            return None
        for i, name in enumerate(layers):
            weight = engine.frozen.read(name, torch.device("cpu"))
            if weight is not None:
                rank = spectrum_of(weight.sub_(before.merged(name))).effective_rank
                found[i] = float("nan") if rank is None else rank
    dist.all_reduce(found)
    return dict(zip(layers, found.tolist(), strict=True))
