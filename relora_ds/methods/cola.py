"""CoLA (arXiv 2502.10940): every linear `W·x` of attention and feed-forward becomes `B·silu(A·x)`, and all trains.

A and B are drawn from N(0, 1)·(r·(in + out))^-1/4. There is no W, nothing is frozen, and nothing is merged: to ZeRO it
is an ordinary model, with fewer parameters than the full one below r = in·out / (in + out).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from relora_ds.methods.own_network import OwnNetwork

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class CoLA(OwnNetwork):
    """The network of `architectures.relora_cola`."""

    name = "cola"
    sections = ("cola",)
    network = "CoLA"

    @property
    def speed_key(self) -> list:
        """The rank decides the size of every product."""
        return [self.name, self.recipe.cola.r, self.recipe.cola.only_lr_activation]

    def config(self, values: Mapping[str, Any]) -> "PretrainedConfig":
        """Return the configuration of the network for `values`, those of the LLaMA."""
        from relora_ds.architectures.relora_cola import ReLoRACoLAConfig

        activation = {"hidden_act": "linear"} if self.recipe.cola.only_lr_activation else {}
        return ReLoRACoLAConfig(**{**values, **activation, "cola_r": self.recipe.cola.r})
