"""Fill in a DeepSpeed configuration: every "auto", and everything that matters to a ReLoRA run."""

import copy
from collections.abc import Mapping
from typing import Any

from relora_ds.zero.ds_config import RECIPE_NAMES, problems
from relora_ds.zero.ds_keys import AUTO, SECTIONS_WITH_AUTO

# Larger buckets bring nothing, and DeepSpeed's default of 5e8 elements allocates 1 GB even for tiny models.
MAX_BUCKET_SIZE = 50_000_000
# DeepSpeed's defaults, in elements.
PREFETCH_BUCKET_SIZE = 50_000_000
PERSISTENCE_THRESHOLD = 100_000
MAX_LIVE_PARAMETERS = 1_000_000_000
MAX_REUSE_DISTANCE = 1_000_000_000


def resolve(
    config: dict,
    *,
    precision: str,
    micro_batch_size: int | None,
    accumulation: int | None,
    world_size: int,
    max_grad_norm: float,
    num_trainable: int,
    cpu: bool = False,
    names: Mapping[str, str] = RECIPE_NAMES,
) -> dict[str, Any]:
    """Return what `deepspeed.initialize` gets: `config` with every "auto", and everything that matters, filled in.

    Args:
        precision: fp32, bf16 or fp16.
        micro_batch_size: sequences per forward and rank; None = the config's, else 1.
        accumulation: micro-steps per optimizer step; None = the config's, also by way of its train_batch_size, else 1.
        world_size: number of ranks.
        max_grad_norm: 0 = no clipping.
        num_trainable: T, elements over all ranks; the buckets are sized to it.
        cpu: the ranks compute on CPUs: no overlapped communication, which needs streams.
        names: what the caller calls the values, for messages.

    A value in `config` that is not "auto" stays as it is. The `optimizer` block is dropped: the caller passes an
    optimizer. `config` itself is not changed.

    Raises:
        ValueError: `problems` finds something, or the batch sizes do not multiply out.
    """
    found = problems(config, precision=precision, names=names)
    if found:
        raise ValueError("\n".join(found))
    settings = copy.deepcopy(config)
    settings.pop("optimizer", None)
    if "bfloat16" in settings:
        settings["bf16"] = settings.pop("bfloat16")
    for name in SECTIONS_WITH_AUTO:
        settings[name] = without_autos(settings.get(name) or {})
    _fill(settings, "gradient_clipping", float(max_grad_norm))  # DeepSpeed 0.19 clips at 1.0 when it is absent
    _resolve_batch(settings, micro_batch_size, accumulation, world_size, names["config"])
    for name in ("bf16", "fp16"):
        settings[name]["enabled"] = precision == name
    if precision == "bf16":
        # So that a non-finite step is skipped on all ranks, as in fp16. It is the default since 0.19.
        settings["bf16"].setdefault("check_grad_overflow", True)
    _resolve_zero(settings["zero_optimization"], num_trainable, cpu)
    for key, value in {
        "steps_per_print": 10**12,  # the trainer logs
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW: no compiled op
        # It waits for the GPU at the beginning and the end of every micro-step, for a line of its own.
        "timers": {"throughput": {"enabled": False}},
    }.items():
        settings.setdefault(key, value)
    return settings


def _resolve_batch(
    settings: dict, micro_batch_size: int | None, accumulation: int | None, world_size: int, name: str
) -> None:
    micro = _fill(settings, "train_micro_batch_size_per_gpu", micro_batch_size or 1)
    batch = settings.get("train_batch_size", AUTO)
    if accumulation is None:
        accumulation = 1 if batch == AUTO else max(1, batch // (micro * world_size))
    accumulation = _fill(settings, "gradient_accumulation_steps", accumulation)
    product = micro * accumulation * world_size
    if _fill(settings, "train_batch_size", product) != product:
        raise ValueError(
            f"{name} train_batch_size: {batch} is not {product} = micro-batch {micro} × accumulation "
            f'{accumulation} × {world_size} ranks; use "auto"'
        )


def _resolve_zero(zero: dict, num_trainable: int, cpu: bool) -> None:
    stage = zero.setdefault("stage", 0)
    bucket = max(1, min(MAX_BUCKET_SIZE, num_trainable))
    bucket += bucket % 2  # 16-bit buckets start at 4-byte boundaries
    zero.setdefault("reduce_bucket_size", bucket)
    zero.setdefault("allgather_bucket_size", bucket)
    if stage == 3:
        zero.setdefault("stage3_prefetch_bucket_size", PREFETCH_BUCKET_SIZE)
        # Parameters below it stay whole on every rank: norms and biases, also where the model is tiny.
        zero.setdefault("stage3_param_persistence_threshold", min(PERSISTENCE_THRESHOLD, num_trainable // 100))
        zero.setdefault("stage3_max_live_parameters", MAX_LIVE_PARAMETERS)
        zero.setdefault("stage3_max_reuse_distance", MAX_REUSE_DISTANCE)
    if cpu:
        zero.setdefault("overlap_comm", False)


def _fill(settings: dict, key: str, value):
    """Set `key` where it is absent or "auto", and return its value."""
    if settings.get(key, AUTO) in (AUTO, None):
        settings[key] = value
    return settings[key]


def without_autos(section: dict) -> dict:
    """Return a section without the values that DeepSpeed is to choose."""
    return {
        key: without_autos(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != AUTO
    }
