"""What is looked at in an optimizer step: that its gradients are finite, and that they reach every low-rank layer."""

import logging

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine

from relora_ds.lowrank.targets import summary
from relora_ds.lowrank.wrap import lowrank_layers

logger = logging.getLogger(__name__)


def gradients_are_finite(engine: DeepSpeedEngine) -> bool:
    """Return True if the gradients are finite on every rank; set the engine's gradient norm. Collective."""
    gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    bad = (~torch.isfinite(norm)).to(torch.int32)
    dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    engine._global_grad_norm = norm.item()  # DeepSpeed does not report one here
    return not bad.item()


def skip_step(engine: DeepSpeedEngine) -> None:
    """Count a step without applying it, as DeepSpeed does after an overflow."""
    engine.zero_grad()
    engine._global_grad_norm = float("inf")
    engine._step_applied = False
    engine.losses = None
    engine.skipped_steps += 1
    engine.global_steps += 1
    engine.global_samples += engine.train_batch_size()


def warn_of_untrained(engine) -> None:
    """Name the low-rank layers whose B has no moment after the first step: nothing called them.

    Experts may not have had a token yet. A rank looks at its own shards only, which needs no communication.
    """
    shards = {name: engine.shards[f"{name}.lora_B"] for name in lowrank_layers(engine.module) if "expert" not in name}
    untrained = [name for name, shard in shards.items() if shard.exp_avg.numel() and not shard.exp_avg.read().any()]
    if untrained:
        logger.warning(
            "no gradient reached the low-rank update of %s in the first step: it is not called, or its "
            "result is not used; leave it out with exclude_modules",
            summary(untrained),
        )
