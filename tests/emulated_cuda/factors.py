"""What runs on the emulated ranks: steps of factors (Sparse Spectral Training), in fp16 too."""

import torch
import torch.distributed as dist

from relora_ds.matrix.sst_update import SST
from relora_ds.zero.teardown import release
from tests.emulated_cuda.engines import build, train
from tests.small_models import batch
from tests.zero.test_owner_steps import all_of

# Of k and v, [16, 32], a round has two iterations.
SIZES = {"num_key_value_heads": 1}
FACTORS = dict(
    matrix_optimizer=SST(8, iteration_steps=2, iteration_warmup_steps=1),
    relora=dict(trains="none", restart_every=None),
    sizes=SIZES,
)
SCALE = 10  # the loss scale begins with 2 to the power of it, which no gradient is too large for


def run(stage: int, precision: str, steps: int = 6) -> tuple[list[float], list[float]]:
    """The loss of each step, of this rank; and the norm that clipping sees."""
    engine = build(stage, precision=precision, fp16={"initial_scale_power": SCALE}, **FACTORS)
    losses, norms = [], []
    for step in range(steps):
        losses.append(train(engine, range(step, step + 1)))
        norms.append(float(engine.get_global_grad_norm()))
    release(engine)
    return losses, norms


def overflow(stage: int) -> dict:
    """A gradient that is too large, first in all that trains on one rank, then in one weight of an owner alone."""
    engine = build(stage, precision="fp16", fp16={"initial_scale_power": SCALE, "hysteresis": 1}, **FACTORS)
    train(engine, range(3))
    before, seen = all_of(engine), []
    for spoils_all in (True, False):
        tokens = batch(50, 12).chunk(2)[dist.get_rank()]
        if dist.get_rank() == 1 and not spoils_all:
            next(iter(engine.frozen.layers.values())).gradient_sum.values[0, 0] = torch.inf
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss * torch.inf if dist.get_rank() == 1 and spoils_all else loss)
        engine.step()
        after = all_of(engine)
        changed = [what for what, value in before.items() if after[what] != value]
        seen.append((engine.was_step_applied(), changed, float(engine.optimizer.loss_scale)))
    losses = [train(engine, range(step, step + 1)) for step in range(3, 6)]
    release(engine)
    return {"seen": seen, "losses": losses}
