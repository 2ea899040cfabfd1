"""Adam with a step count for each vector: the rows of A and columns of B that SwitchLoRA resets one at a time.

Adam's moments are means over all steps so far, and are divided by `1 - beta^k` because they begin with 0. With one `k`
for all, a vector whose moments are set to 0 late in a run would take steps of up to 6.5 times the learning rate. To
scale moments so that the common `k` fits is not enough: every new gradient would need another scale for each moment.
So the correction is by vector.

After a reset a vector is frozen: its moments stay 0 for some steps, in which its count grows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VectorSteps:
    """What a step of Adam needs of each vector, 1-D.

    Attributes:
        trains: 1, or 0 where it is frozen.
        size: `lr / (1 - beta1^k)`, or 0 where it is frozen.
        root: `√(1 - beta2^k)`.
    """

    trains: Tensor
    size: Tensor
    root: Tensor


def vector_steps(
    step: Tensor | int,
    resets: Tensor,
    *,
    freeze_steps: int,
    lr: float,
    betas: tuple[float, float],
    dtype: torch.dtype = torch.float32,
) -> VectorSteps:
    """Return what the step number `step`, from 1, needs of each vector.

    Args:
        resets: the number of steps that were taken when a vector was reset; 0: it never was.
        freeze_steps: that it is frozen for.
        dtype: of the result; it is computed in fp64, as `1 - 0.999` has four digits in fp32.
    """
    count = (step - resets).double()
    trains = (resets == 0) | (count > freeze_steps)
    size = lr / (1 - betas[0] ** count) * trains
    return VectorSteps(trains.to(dtype), size.to(dtype), (1 - betas[1] ** count).sqrt().to(dtype))


def update_(
    values: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    of: Tensor,
    steps: VectorSteps,
    *,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Take a step of Adam, in place: elements of frozen vectors stay, and their moments become 0.

    All 1-D and of one length. of: the vector that each element belongs to.
    """
    trains = steps.trains.index_select(0, of)
    gradient = gradient * trains
    exp_avg.mul_(trains).lerp_(gradient, 1 - betas[0])
    exp_avg_sq.mul_(trains).mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    denominator = exp_avg_sq.sqrt().div_(steps.root.index_select(0, of)).add_(eps)
    values.sub_(exp_avg.mul(steps.size.index_select(0, of)).div_(denominator))
