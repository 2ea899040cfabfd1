"""What every layer is whose weight an owner updates and not DeepSpeed's optimizer: the weight, and how it is stored.

The weight stays in the layout of the model that was wrapped, so that its values go in and out as they are:

    nn.Linear                         weight `[out, in]`
    transformers' Conv1D (GPT-2)      weight `[in, out]`: transposed
    experts of a mixture              weight `[experts, out, in]`, or transposed
"""

from typing import Any

import torch
from torch import Tensor, nn

from relora_ds.lowrank.base_format import Format
from relora_ds.lowrank.formats import DENSE
from relora_ds.lowrank.frozen import plain_name
from relora_ds.lowrank.gradient_sum import GradientSum
from relora_ds.lowrank.reinit import GradientTap


class OwnedLayer(nn.Module):
    """A module with a `weight` that autograd does not train.

    Args:
        weight_shape: of the plain weight, in the model's layout.
        weight: taken over, not copied; None where the layer goes without one (LoRA without a base).
        transposed: the weight is `[..., in, out]`.
        is_parameter: the weight is a parameter of the plain model's module, not the `weight` of a module of its own.

    Attributes:
        weight: dense at first; `store_weight` puts it into another format.
        decay: ρ, a tensor without dimensions on the CPU: the layer computes with `ρ·W`. None: 1.
        sketch: set it to a `GradientTap`, and every backward adds W's gradient to it (linears, without dropout).
        gradient_sum: the same, for experts too.
    """

    weight: Any  # a parameter, a buffer or None
    decay: Tensor | None = None

    def __init__(
        self,
        weight_shape: torch.Size,
        weight: nn.Parameter | None,
        *,
        transposed: bool = False,
        is_parameter: bool = False,
    ):
        super().__init__()
        *experts, rows, columns = self.weight_shape = torch.Size(weight_shape)
        self.in_features, self.out_features = (rows, columns) if transposed else (columns, rows)
        self.experts = torch.Size(experts)
        self.transposed, self.is_parameter = transposed, is_parameter
        self.format: Format = DENSE
        self.sketch: GradientTap | None = None
        self.gradient_sum: GradientSum | None = None
        if weight is not None:
            weight.requires_grad_(False)
        self.register_parameter("weight", weight)

    @property
    def dtype(self) -> torch.dtype:
        """In which the layer computes, where its weight is dense."""
        return self.weight.dtype

    @property
    def taps(self) -> tuple[GradientTap, ...]:
        """What every backward adds W's gradient to."""
        return tuple(tap for tap in (self.sketch, self.gradient_sum) if tap is not None)

    @property
    def shape_of_gradient(self) -> torch.Size:
        """`[..., out, in]`, in whatever layout the weight is."""
        return torch.Size((*self.experts, self.out_features, self.in_features))

    def plain_name(self, name: str) -> str:
        """Return the weight's name in the plain model (in the wrapped one: `{name}.weight`). name: of this layer."""
        return plain_name(name, self.about())

    def about(self) -> dict:
        """Return what a reader of its tensors must know of the layer, as JSON; what is false by default is left out."""
        flags = {"transposed": self.transposed, "is_parameter": self.is_parameter}
        return {
            "base": self.weight is not None,
            "shape": list(self.weight_shape),
            **{flag: True for flag, value in flags.items() if value},
        }

    @property
    def rho(self) -> float:
        """What weight decay has left of W since W was last written."""
        return 1.0 if self.decay is None else float(self.decay)

    def store_weight(self, stored: Tensor, format: Format, *, as_buffer: bool) -> None:
        """Replace the weight by one that `format` has quantized.

        as_buffer: as a buffer outside of the state dict instead of a parameter; ZeRO leaves those alone.
        """
        del self.weight
        self.format = format
        if as_buffer:
            self.register_buffer("weight", stored, persistent=False)
        else:
            self.register_parameter("weight", nn.Parameter(stored, requires_grad=False))

    @torch.no_grad()
    def merged_weight(self) -> Tensor:
        """Return `ρ·W` in fp32, in the shape of the plain weight; a new tensor."""
        weight = self.format.dequantize(self.weight, self.weight_shape, torch.float32)
        return weight.mul(self.rho)
