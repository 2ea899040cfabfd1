"""What a method costs one rank, at one ZeRO stage and world size: memory and bytes on the wire."""

from dataclasses import dataclass, replace

from transformers import PretrainedConfig

from relora_ds.config import RecipeError, accumulation_steps
from relora_ds.methods import Method
from relora_ds.planning import device_memory, host
from relora_ds.planning.activations import activation_bytes
from relora_ds.planning.network import Shapes, shapes_of
from relora_ds.planning.planned_exchange import exchange_bytes, exchange_items
from relora_ds.planning.planned_storage import format_here, storage_of
from relora_ds.planning.planned_switches import switch_bytes, switch_items
from relora_ds.planning.planned_traffic import restart_bytes, step_bytes, update_bytes
from relora_ds.training.preflight import Resolved
from relora_ds.zero import factor_steps, owner_steps, owner_updates
from relora_ds.zero.merging import peak_bytes


@dataclass(frozen=True)
class Cost:
    """Bytes on one rank; traffic as `(payload, wire)`.

    Attributes:
        accumulation: micro-steps per optimizer step; None where the recipe's batch cannot be split over so many
            ranks (`items` are those of one micro-step then).
        items: see `device_memory.state`, `host.moments` and `planned_exchange.exchange_items`.
        step: of one optimizer step; None where `accumulation` is.
        restart: of one restart; None for a method that merges nothing.
        residual: of one update by what a one-sided chain leaves out; None without such.
        exchange: what an island sends in one exchange, all its ranks together; None for a run that is none.
    """

    stage: int
    world_size: int
    accumulation: int | None
    shapes: Shapes
    items: list[device_memory.Item]
    step: tuple[float, float] | None
    restart: tuple[float, float] | None
    residual: tuple[float, float] | None = None
    exchange: int | None = None


def cost(
    resolved: Resolved,
    method: Method,
    config: PretrainedConfig,
    *,
    stage: int | None = None,
    world_size: int | None = None,
    shapes: Shapes | None = None,
) -> Cost:
    """Return the cost of training the network `config` by `method`. Default: the recipe's stage and world size.

    shapes: those of `method` on `config`, if they are known already.
    """
    recipe, precision = resolved.recipe, resolved.precision
    world_size = world_size or resolved.world_size
    stage = resolved.stage if stage is None else stage
    deepspeed = device_memory.at_stage(resolved.deepspeed, stage)
    shapes = shapes or shapes_of(method, config)
    try:
        accumulation = accumulation_steps(recipe, world_size)
    except RecipeError:
        accumulation = None
    zero = device_memory.zero_section(
        recipe, deepspeed, shapes, precision=precision, accumulation=accumulation or 1, world_size=world_size
    )
    items = device_memory.state(
        shapes, zero, method.relora, precision=precision, world_size=world_size, accumulation=accumulation or 1
    )
    items += host.moments(
        shapes,
        storage_of(shapes, method.relora, precision=precision, stage=stage),
        method.relora,
        world_size=world_size,
        after_warm_start=method.warm_start_steps > 0,
    )
    step = restart = residual = None
    if accumulation is not None:
        step = step_bytes(
            shapes,
            zero,
            method.relora,
            precision=precision,
            accumulation=accumulation,
            world_size=world_size,
            checkpointing=recipe.activation_checkpointing,
        )
    if method.relora is not None and method.relora.restart_every is not None and shapes.merged:
        merge = peak_bytes(shapes.merged, method.relora.r, stage=stage, world_size=world_size)
        items.append(device_memory.Item("a merge", merge, when=device_memory.RESTART))
        restart = restart_bytes(shapes, zero, method.relora, precision=precision, world_size=world_size)
    if method.relora is not None and method.relora.residual_every is not None and shapes.merged:
        residual = update_bytes(shapes, zero, method.relora, precision=precision, world_size=world_size)
        if restart is None:  # that needs more, at another time
            size = _copies_of_largest(shapes, owner_updates.COPIES)
            items.append(device_memory.Item("a residual update", size, when=device_memory.UPDATE))
    if method.relora is not None and method.has_owners:
        update = update_bytes(shapes, zero, method.relora, precision=precision, world_size=world_size)
        if shapes.factors_sent:
            what, size = "an update of factors", factor_steps.peak_bytes(shapes.merged, shapes.factors_sent)
        else:
            what, size = "an owner's update", _copies_of_largest(shapes, owner_steps.COPIES)
        items.append(device_memory.Item(what, size, when=device_memory.UPDATE))
        step = step and (step[0] + update[0], step[1] + update[1])
        # They are stored as frozen ones are, and train.
        items = [replace(item, what=item.what.replace("frozen weights", "owners' weights")) for item in items]
    if method.switching is not None and method.relora is not None:
        items += switch_items(shapes, stage=stage, world_size=world_size)
        switches = switch_bytes(
            shapes,
            method.relora.r,
            method.switching,
            total_steps=recipe.total_steps,
            stage=stage,
            world_size=world_size,
        )
        step = step and (step[0] + switches[0], step[1] + switches[1])
    exchange = None
    if recipe.islands.count is not None:
        exchange = exchange_bytes(shapes, method.relora, recipe.islands)
        items += exchange_items(shapes, method.relora, recipe.islands, world_size=world_size)
    return Cost(stage, world_size, accumulation, shapes, items, step, restart, residual, exchange)


def _copies_of_largest(shapes: Shapes, copies: int) -> int:
    return device_memory.MASTER * copies * max(shape.numel() for shape in shapes.merged.values())


def activations_of(
    resolved: Resolved, method: Method, config: PretrainedConfig, micro_batch_size: int | None = None
) -> int | None:
    """`activation_bytes` of the recipe. micro_batch_size: default its own."""
    recipe = resolved.recipe
    return activation_bytes(
        method,
        config,
        precision=resolved.precision,
        seq_len=recipe.data.seq_len,
        micro_batch_size=micro_batch_size or recipe.train.micro_batch_size,
        attn_implementation=recipe.model.attn_implementation,
        checkpointing=recipe.activation_checkpointing,
        format=format_here(method.relora, resolved.precision, resolved.stage),
    )
