"""What a recipe means on the machines that it runs on: the precision and the micro-steps."""

from relora_ds.config import rules
from relora_ds.config.errors import RecipeError
from relora_ds.config.schema import Recipe


def resolve_precision(precision: str, cuda_bf16: bool) -> str:
    """Return fp32, bf16 or fp16. cuda_bf16: whether the run's devices are CUDA devices that compute in bf16.

    auto never picks fp16: its loss scaling changes which steps are applied. It never picks bf16 on a CPU: the demos
    run there, and fp32 is as fast and more exact.
    """
    if precision != "auto":
        return precision
    return "bf16" if cuda_bf16 else "fp32"


def batch_field(recipe: Recipe) -> tuple[str, int]:
    """Return (the key that sets the batch, a sequence in its unit: 1 or seq_len)."""
    if recipe.train.batch_sequences is None:
        return "train.batch_tokens", recipe.data.seq_len
    return "train.batch_sequences", 1


def accumulation_steps(recipe: Recipe, world_size: int) -> int:
    """Return the micro-steps per optimizer step on `world_size` ranks.

    Raises:
        RecipeError: ranks × micro_batch_size do not divide the batch; it names the nearest batch sizes that work.
    """
    micro, batch = recipe.train.micro_batch_size, recipe.batch_sequences
    if batch % (micro * world_size) == 0:
        return batch // (micro * world_size)
    name, unit = batch_field(recipe)
    sizes = rules.nearest_multiples(batch, micro * world_size)
    remedies = [f"{name}={size * unit}" for size in sizes]
    smaller = [m for m in range(micro - 1, 0, -1) if batch % (m * world_size) == 0][:1]
    remedies += [f"train.micro_batch_size={m}" for m in smaller]
    raise RecipeError(
        [
            f"{name}: {batch * unit} ({batch} sequences) cannot be split into {world_size} ranks × "
            f"train.micro_batch_size {micro}; use {' or '.join(remedies)}"
        ]
    )
