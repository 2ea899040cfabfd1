"""CR-Net (Kong et al., ICLR 2026): a linear adds a product of low rank to what the layer before has computed there.

For each of q, k, v, o, gate, up and down: `Y = W·x` in the first layer, `Y = f(β)·Y_before + B·A·x` in the others, with
a scalar β for each. All of it trains. To ZeRO it is an ordinary model. The authors have published no code; what their
paper leaves open (learning rates, first values, ranks by size) is chosen here, and recipes and guides say where.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from relora_ds.methods.own_network import OwnNetwork

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class CRNet(OwnNetwork):
    """The network of `architectures.relora_crnet`."""

    name = "crnet"
    sections = ("crnet",)
    network = "CR-Net"

    @property
    def speed_key(self) -> list:
        """The rank decides the size of every product."""
        return [self.name, self.recipe.crnet.r]

    def problems(self, model: "PreTrainedModel") -> list[str]:
        """Return why `model` is none whose linears can become factors, or too shallow for any."""
        if found := super().problems(model):
            return found
        if model.config.num_hidden_layers > 1:
            return []
        return [
            "method: crnet leaves the first layer whole, and this model has no other (num_hidden_layers: 1); use a "
            "deeper one, or method=full"
        ]

    def config(self, values: Mapping[str, Any]) -> "PretrainedConfig":
        """Return the configuration of the network for `values`, those of the LLaMA."""
        from relora_ds.architectures.relora_crnet import ReLoRACRNetConfig

        own = self.recipe.crnet
        return ReLoRACRNetConfig(**{**values, "crnet_r": own.r, "crnet_beta": own.beta})
