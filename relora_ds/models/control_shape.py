"""The Control baseline: a full-rank network as large as what the ReLoRA run *trains* (arXiv 2307.05695, sec. 4).

It answers the question that a comparison with full rank leaves open: does the frozen part earn its memory, or would a
smaller ordinary network do? Same family, depth, heads and vocabulary; hidden and feed-forward size shrink.
"""

import copy
import math

from transformers import PretrainedConfig

from relora_ds.models.build import count_parameters

# Shapes this near to the wanted size are equally good; among them the proportions of the original decide.
_TOLERANCE = 0.002


def control_config(config: PretrainedConfig, num_trainable: int) -> PretrainedConfig:
    """Return the configuration nearest to `num_trainable` parameters in total.

    hidden_size goes down in steps of heads × the smallest head size that rotary positions allow, and intermediate_size
    with it in the original proportion; then intermediate_size alone makes up the difference. Deterministic, counted on
    the meta device. A head size that does not divide `hidden_size` in the original (Qwen3) is kept in proportion.

    ValueError: num_trainable above the full network's parameters, below the smallest shape's, or a family without
    hidden_size, intermediate_size and num_attention_heads in its configuration.
    """
    missing = [
        name
        for name in ("hidden_size", "intermediate_size", "num_attention_heads")
        if getattr(config, name, None) is None
    ]
    if missing:
        raise ValueError(
            f"method: control cannot shrink a {config.model_type} model, whose configuration has no "
            f"{', '.join(missing)}; use a LLaMA, Qwen2 or GPT-NeoX shape"
        )
    full = count_parameters(config)
    if num_trainable > full:
        raise ValueError(
            f"method: control would need {num_trainable:,} parameters, as many as the low-rank run "
            f"trains, but the whole network has {full:,}; use a lower relora.r, or method=full"
        )
    if num_trainable == full:
        return copy.deepcopy(config)
    step = _head_size_step(config)
    num_sizes = config.hidden_size // (config.num_attention_heads * step)
    smallest = count_parameters(_shrunk(config, step))
    if num_sizes < 1 or num_trainable < smallest:
        raise ValueError(
            f"method: control would need {num_trainable:,} parameters, but the smallest network with "
            f"{config.num_hidden_layers} layers of {config.num_attention_heads} heads has {smallest:,}; "
            "use a higher relora.r"
        )
    low, high = 1, num_sizes + 1  # the largest head size whose proportional network is not too large is in [low, high)
    while high - low > 1:
        middle = (low + high) // 2
        if count_parameters(_shrunk(config, middle * step)) <= num_trainable:
            low = middle
        else:
            high = middle
    candidates = [_fit_intermediate(config, size * step, num_trainable) for size in (low, high) if size <= num_sizes]
    return min(candidates, key=lambda c: _unfitness(c, config, num_trainable))


def _head_size_step(config: PretrainedConfig) -> int:
    """Head sizes must be multiples of this: the rotated part of a head is an even whole number of channels."""
    rope = getattr(config, "rope_parameters", None) or {}
    rotated = (
        rope.get("partial_rotary_factor")
        or getattr(config, "rotary_pct", None)
        or getattr(config, "partial_rotary_factor", None)
        or 1.0
    )
    return next(step for step in range(2, 129, 2) if math.isclose(step * rotated % 2, 0) and step * rotated >= 2)


def _shrunk(config: PretrainedConfig, head_size: int, intermediate_size: int | None = None) -> PretrainedConfig:
    """`config` with heads of hidden_size / num_attention_heads = head_size; None = the feed-forward in proportion."""
    shrunk = copy.deepcopy(config)
    shrunk.hidden_size = head_size * config.num_attention_heads
    if intermediate_size is None:
        intermediate_size = max(1, round(config.intermediate_size * shrunk.hidden_size / config.hidden_size))
    shrunk.intermediate_size = intermediate_size
    if getattr(config, "head_dim", None) is not None:
        step = _head_size_step(config)
        scaled = config.head_dim * shrunk.hidden_size / config.hidden_size
        shrunk.head_dim = max(step, round(scaled / step) * step)
    return shrunk


def _fit_intermediate(config: PretrainedConfig, head_size: int, num_parameters: int) -> PretrainedConfig:
    """Return the feed-forward size that brings the total nearest to num_parameters (the total is affine in it)."""
    one, two = (count_parameters(_shrunk(config, head_size, size)) for size in (1, 2))
    return _shrunk(config, head_size, max(1, round(1 + (num_parameters - one) / (two - one))))


def _unfitness(candidate: PretrainedConfig, config: PretrainedConfig, num_parameters: int) -> tuple[float, float]:
    """(relative error in size, 0 within the tolerance; distortion of the feed-forward proportion)."""
    error = abs(count_parameters(candidate) / num_parameters - 1)
    proportion = candidate.intermediate_size / candidate.hidden_size * config.hidden_size / config.intermediate_size
    return (error if error > _TOLERANCE else 0.0, abs(math.log(proportion)))
