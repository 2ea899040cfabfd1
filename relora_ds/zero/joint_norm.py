"""One gradient norm over what DeepSpeed's optimizer trains and what the owners update.

DeepSpeed clips by the norm of the gradients that it has, and skips a step where that is not finite. Each of its
optimizer wrappers computes the norm in a method of its own; there the owners' part is put in.
"""

import math
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor


class JointNorm:
    """Makes DeepSpeed's norm that of all gradients.

    Attributes:
        owners: norm of the gradients of all owned weights, over all ranks, without the loss scale; inf has DeepSpeed
            skip the step.
    """

    def __init__(self) -> None:
        self.owners = 0.0
        self._wrapper: Any = None
        self._is_reported = False

    def install(self, wrapper: Any) -> None:
        """Put it into what DeepSpeed has wrapped the optimizer in; nothing where it has not (stage 0 in fp32)."""
        self._wrapper = wrapper
        self._is_reported = type(wrapper) in (DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer)
        if (install := _INSTALL.get(type(wrapper))) is not None:
            install(self, wrapper)

    def of(self, norm: float | Tensor) -> float:
        """Return the norm of everything. norm: that of DeepSpeed's gradients, without the loss scale."""
        return math.hypot(float(norm), self.owners)

    def reported(self, norm: float | Tensor) -> float:
        """Return the norm of everything. norm: what DeepSpeed reports after a step."""
        return float(norm) if self._is_reported else self.of(norm)

    def scaled(self, norm: float | Tensor) -> float:
        """Return the same of gradients with DeepSpeed's loss scale."""
        return math.hypot(float(norm), self.owners * float(self._wrapper.loss_scale))


def clip_coefficient(norm: float, max_norm: float) -> float:
    """Return what clipping multiplies all gradients with, as DeepSpeed computes it. max_norm: 0 for no clipping."""
    return min(1.0, max_norm / (norm + 1e-6)) if max_norm else 1.0


def _install_12(joint: JointNorm, wrapper: Any) -> None:
    real = wrapper.scaled_global_norm
    wrapper.scaled_global_norm = lambda norm_type=2: torch.tensor(joint.scaled(real(norm_type)))


def _install_3(joint: JointNorm, wrapper: Any) -> None:
    real = wrapper._get_norm_groups

    def norms() -> list:
        return [*real(), joint.scaled(0.0)]

    wrapper._get_norm_groups = norms


def _install_bf16(joint: JointNorm, wrapper: Any) -> None:
    real = wrapper.get_grads_for_norm

    def gradients(for_clipping: bool = False):
        found = real(for_clipping=for_clipping)
        if for_clipping:
            return found
        dense, experts = found
        return [*dense, torch.tensor([joint.owners], device=dense[0].device)], experts

    wrapper.get_grads_for_norm = gradients


def _install_unfused(joint: JointNorm, wrapper: Any) -> None:
    real, check = wrapper.unscale_and_clip_grads, wrapper.overflow_checker.check

    def clip(total_norm, apply_scale: bool = True):
        return real(joint.of(total_norm), apply_scale)

    wrapper.unscale_and_clip_grads = clip
    wrapper.overflow_checker.check = lambda *given: not math.isfinite(joint.owners) or check(*given)


_INSTALL = {
    DeepSpeedZeroOptimizer: _install_12,
    DeepSpeedZeroOptimizer_Stage3: _install_3,
    BF16_Optimizer: _install_bf16,
    FP16_UnfusedOptimizer: _install_unfused,
}
