"""Adam's moments of B when the basis A changes (`relora.optimizer_reset: rotate`), after LDAdam (arXiv 2410.16103).

With `W + s·B·A` the gradient of B is the gradient of W in the coordinates of the basis A. A new basis has other
coordinates. The mean of the gradient turns as a vector does. Its variance, of which Adam knows the diagonal, turns with
the squares of the entries.
"""

from torch import Tensor

from relora_ds.lowrank.precision import exact_products


def rotated(
    exp_avg: Tensor, exp_avg_sq: Tensor, turn: Tensor, *, step: int, betas: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Return both moments in the new basis, `m·T` and `(1 − β₂ᵗ)·|(v̂ − m̂²)(T∘T) + (m̂·T)²|`; hats correct the bias.

    Args:
        exp_avg, exp_avg_sq: `[..., out, r]`, fp32.
        turn: `T = old A · new Aᵀ`, `[..., r, r]`, fp32.
        step: Adam's, of the moments; with 0 they are 0.
    """
    if step == 0:
        return exp_avg, exp_avg_sq
    first, second = 1 - betas[0] ** step, 1 - betas[1] ** step
    with exact_products():
        mean, turned = exp_avg / first, exp_avg @ turn
        variance = exp_avg_sq / second - mean.square()
        square = variance @ turn.square() + (turned / first).square()
    return turned, square.abs() * second
