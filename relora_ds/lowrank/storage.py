"""What a config asks for about the storage of the frozen weights, and what is wrong with it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank.base_format import Format
from relora_ds.lowrank.formats import DTYPES, format_named, format_of

# What 20 merges without masters lose of updates that make up 10 % of W, in per cent: docs/results/quantization.md.
_LOST_WITHOUT_MASTER = {"int8": 0.1, "fp8": 32, "nf4": 98}


@dataclass(frozen=True)
class Storage:
    """How the frozen weights of an engine are kept.

    Attributes:
        format: name of the format of the stored copies.
        dtype: of what is stored in floating point, as text.
        replicated: the weights are buffers, which ZeRO-3 leaves alone.
        with_masters: there are fp32 masters.
    """

    format: str
    dtype: str
    replicated: bool
    with_masters: bool

    @property
    def exact(self) -> bool:
        """The stored copies are in fp32 themselves."""
        return self.dtype == "fp32"

    def same_bytes(self, other: "Storage") -> bool:
        """Return whether both hold a weight in the same bytes, at the same place."""
        return (self.format, self.dtype, self.replicated) == (other.format, other.dtype, other.replicated)

    def rounds_like(self, other: "Storage") -> bool:
        """Return whether the stored copies of both are rounded alike, wherever they are."""
        return (self.format, self.dtype) == (other.format, other.dtype)

    def dequantize(self, stored: Tensor, shape: torch.Size) -> Tensor:
        """Return the fp32 weight `[out, in]` that a stored copy stands for."""
        return format_named(self.format).dequantize(stored, shape, torch.float32)

    def __str__(self) -> str:
        return f"{self.dtype or self.format}{' (replicated)' if self.replicated else ''}"


def storage_problems(config: ReLoRAConfig, precision: str) -> list[str]:
    """Return why frozen weights cannot be stored or updated as asked for in a run of `precision`, one message each."""
    found = []
    format = format_of(config.frozen_dtype, precision, double_quant=config.frozen_double_quant)
    if reason := format.unavailable():
        found.append(f"relora.frozen_dtype: {config.frozen_dtype} {reason}")
    if config.frozen_master == "none" and format.floating_dtype(DTYPES[precision]) == torch.float16:
        found.append(
            "relora.frozen_master: none needs weights stored in bf16 or fp32, where they can be rounded "
            "without bias, or in 8 or 4 bits; use frozen_master=cpu"
        )
    if config.residual_every is not None and precision == "fp16":
        found.append(
            f"relora.residual_every: {config.residual_every} adds up gradients over several steps, between which the "
            "loss scale of fp16 changes; use precision=bf16 or precision=fp32"
        )
    return found


def storage_warnings(config: ReLoRAConfig, precision: str, stage: int) -> list[str]:
    """Return what options of the frozen weights do not do, or lose, in `precision` (not auto) at a ZeRO stage."""
    return list(_storage_warnings(config, precision, stage))


def _storage_warnings(config: ReLoRAConfig, precision: str, stage: int) -> Iterator[str]:
    stored = precision if config.frozen_dtype == "auto" else config.frozen_dtype
    if config.frozen_double_quant and stored != "nf4":
        yield f"relora.frozen_double_quant: true has no effect with frozen_dtype {config.frozen_dtype}; it is for nf4"
    if config.frozen_placement == "sharded" and stage < 3:
        yield (
            f"relora.frozen_placement: sharded has no effect at ZeRO stage {stage}, where every rank has whole "
            "weights; use a configuration of stage 3"
        )
    if config.frozen_master != "cpu" and stored == "fp32":
        yield f"relora.frozen_master: {config.frozen_master} has no effect: W is stored in fp32, which needs no master"
    elif config.frozen_master == "none" and config.restart_every is not None:
        if stored == "bf16":
            lost = "rounded at random to one of its neighbours in bf16, which adds noise to it"
        else:
            lost = f"rounded to {stored}, and what is rounded away is lost"
            if stored in _LOST_WITHOUT_MASTER:
                lost += f" ({_LOST_WITHOUT_MASTER[stored]:g} % of 20 updates that make up 10 % of W)"
        yield (
            f"relora.frozen_master: none means that each merged W is {lost}; the metric merge_loss tells how much, "
            "and frozen_master=cpu loses nothing"
        )


def is_sharded(config: ReLoRAConfig, stage: int) -> bool:
    """Return whether ZeRO shards the stored copies: parameters at stage 3; buffers it leaves alone."""
    return stage == 3 and config.frozen_placement != "replicated"


def format_at(config: ReLoRAConfig, precision: str, stage: int, *, in_fp8: bool) -> Format:
    """Return the format of stored copies at a ZeRO stage. in_fp8: the devices multiply in fp8 (`multiplies_fp8`)."""
    # Sharded, the codes of the transposed weights would be gathered at every step too.
    return format_of(
        config.frozen_dtype,
        precision,
        double_quant=config.frozen_double_quant,
        in_fp8=in_fp8 and not is_sharded(config, stage),
    )


def has_masters(config: ReLoRAConfig, precision: str) -> bool:
    """Return whether there are fp32 masters beside the stored copies; those in fp32 need none."""
    stored = format_of(config.frozen_dtype, precision).floating_dtype(DTYPES[precision])
    return config.frozen_master != "none" and stored != torch.float32


def shape_problems(shapes: dict[str, torch.Size], format: Format) -> list[str]:
    """Return which weights, `[out, in]` by layer, a format cannot store; one message for those of the same shape."""
    names: dict[torch.Size, list[str]] = {}
    for name, shape in shapes.items():
        if format.problem(shape):
            names.setdefault(shape, []).append(name)
    return [
        f"relora.frozen_dtype: {first}{f' and {len(others)} more' if others else ''}: {format.problem(shape)}"
        for shape, (first, *others) in names.items()
    ]
