"""Bytes of a step and of a restart, from sizes alone; `zero.traffic` counts the real ones."""

from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.reinit import OVERSAMPLED
from relora_ds.planning.network import Shapes
from relora_ds.planning.planned_storage import ELEMENT_SIZE, PlannedStorage, gathered_by_stage_3, storage_of
from relora_ds.zero.traffic import expected_step

# The histograms that find a pruning threshold: 11, 10 and 10 bits of a magnitude, one counter of 4 bytes each.
HISTOGRAM_BYTES = 4 * (2**11 + 2**10 + 2**10)


def step_bytes(
    shapes: Shapes,
    zero: dict,
    relora: ReLoRAConfig | None,
    *,
    precision: str,
    accumulation: int,
    world_size: int,
    checkpointing: str = "none",
) -> tuple[float, float]:
    """`(payload, wire)` of one optimizer step; see `expected_step`.

    zero: a resolved `zero_optimization` section. Where the network is larger than what stage 3 may keep gathered,
    backward gathers again what forward has let go: everything counts twice then, an upper bound. Where activations are
    checkpointed (in any mode), the decoder layers but the last are gathered once more to be computed again.
    """
    stage, element_size = zero["stage"], ELEMENT_SIZE[precision]
    if stage < 3:
        return expected_step(
            stage,
            trainable=shapes.num_trainable,
            frozen_bytes=0,
            element_size=element_size,
            accumulation=accumulation,
            world_size=world_size,
        )
    storage = storage_of(shapes, relora, precision=precision, stage=stage)
    gathered = gathered_by_stage_3(shapes, storage, zero, element_size)
    payload, wire = expected_step(
        stage,
        trainable=shapes.num_trainable,
        frozen_bytes=storage.sharded_bytes,
        element_size=element_size,
        accumulation=accumulation,
        world_size=world_size,
        small_bytes=gathered.small_bytes,
    )
    again = gathered.repeated_bytes if checkpointing != "none" else 0
    if gathered.elements > min(int(zero["stage3_max_live_parameters"]), int(zero["stage3_max_reuse_distance"])):
        again += gathered.num_bytes
    again *= accumulation
    return payload + again, wire + again * (world_size - 1) / world_size


def restart_bytes(
    shapes: Shapes, zero: dict, relora: ReLoRAConfig, *, precision: str, world_size: int
) -> tuple[float, float]:
    """`(payload, wire)` of one restart; checksums and counts of ties, a few hundred bytes a layer, are left out.

    Every frozen weight is broadcast by its owner, as it is stored, and so is a frozen A. Where the masters are split
    (stages 1 to 3), what trains of A and B is reduced to the owners in fp32, and pruning by magnitude finds its
    thresholds by three reduced histograms for each factor. ZeRO-3 without masters gathers the frozen weights first,
    unless they are replicated: once to see that the merged ones are finite, and once to merge. What a basis is chosen
    from is in `_subspace_bytes`.

    It is a restart of the trainer, which measures the drift by a forward before and one after it: at stage 3 they
    gather the network twice. The small parameters that stage 3 keeps whole are spared the first time; the restart
    lets go of them.

    zero: a resolved `zero_optimization` section.
    """
    stage = zero["stage"]
    storage = storage_of(shapes, relora, precision=precision, stage=stage)
    one_way, both_ways = sum(stored.num_bytes for stored in storage.merged.values()), 0
    if stage == 3:
        gathered = gathered_by_stage_3(shapes, storage, zero, ELEMENT_SIZE[precision])
        if not storage.with_masters:
            one_way += 2 * sum(stored.num_bytes for stored in storage.merged.values() if stored.sharded)
        one_way += 2 * gathered.num_bytes + gathered.small_bytes
    if stage > 0:
        one_way += 4 * sum(shapes.trained_factors)
        moments = {"magnitude_joint": 1, "magnitude": 2}.get(relora.optimizer_reset, 0)
        both_ways = moments * len(shapes.trained_factors) * HISTOGRAM_BYTES
    one_way += _subspace_bytes(shapes, storage, relora, stage)
    share = (world_size - 1) / world_size
    return one_way + both_ways, (one_way + 2 * both_ways) * share


def update_bytes(
    shapes: Shapes, zero: dict, relora: ReLoRAConfig, *, precision: str, world_size: int
) -> tuple[float, float]:
    """`(payload, wire)` of one update of the frozen weights by their owners: in a step, or by a chain's residual.

    Every sum of gradients is reduced to the owner in fp32, and every frozen weight is broadcast as it is stored; where
    weights are products of factors, what a step changes of those, twice. ZeRO-3 gathers the bases first and, without
    masters, the frozen weights, unless they are replicated; and once more the small parameters that it keeps whole,
    which the update lets go of.

    zero: a resolved `zero_optimization` section.
    """
    stage = zero["stage"]
    storage = storage_of(shapes, relora, precision=precision, stage=stage)
    if shapes.factors_sent:
        payload = 2 * sum(shapes.factors_sent.values())
    else:
        payload = 4 * sum(shape.numel() for shape in shapes.merged.values())
        payload += sum(stored.num_bytes for stored in storage.merged.values())
    payload += sum(base.num_bytes for base in storage.bases.values() if base.sharded)
    if stage == 3:
        payload += gathered_by_stage_3(shapes, storage, zero, ELEMENT_SIZE[precision]).small_bytes
        if not storage.with_masters and not shapes.factors_sent:
            payload += sum(stored.num_bytes for stored in storage.merged.values() if stored.sharded)
    return payload, payload * (world_size - 1) / world_size


def _subspace_bytes(shapes: Shapes, storage: PlannedStorage, relora: ReLoRAConfig, stage: int) -> int:
    """Return what is sent one way, in the restart, to choose the next A's, to store them and to turn moments.

    Not what the step before it sends: B's first moment for `warm_sketch`, the gradients for `exact`.
    """
    in_A = sum(A for A, _ in shapes.factors)
    num_bytes = 0
    if relora.restart_init == "gradient" and relora.gradient_estimate != "exact":
        num_bytes += 4 * (in_A + in_A // relora.r * OVERSAMPLED)
    if shapes.bases:
        stored = sum(base.num_bytes for base in storage.bases.values())
        gathered = sum(base.num_bytes for base in storage.bases.values() if base.sharded)
        rotates = relora.optimizer_reset == "rotate"
        num_bytes += stored + gathered * (3 if rotates else 1)
        num_bytes += 4 * 2 * sum(B for _, B in shapes.factors) * ((stage > 0) + 1) * rotates
    elif relora.restart_init != "kaiming":
        num_bytes += 4 * in_A
    return num_bytes
