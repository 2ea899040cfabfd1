"""SCALE (arXiv 2506.16659): normalised rows, and momentum in the head alone. See `matrix.scale_update`."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from relora_ds.methods.owner import Owner

if TYPE_CHECKING:
    from torch import nn

    from relora_ds.matrix.scale_update import Scale as Rule


class Scale(Owner):
    """Normalised gradients of all matrices, head and embedding among them: nearly without optimizer state."""

    name = "scale"
    sections = ("scale",)
    defaults = MappingProxyType({"relora.target_modules": "all-matrices"})

    def matrix_optimizers(self, model: "nn.Module") -> "Mapping[str, Rule]":
        """Return the rule of each wrapped layer: head and embedding have rules of their own."""
        from relora_ds.lowrank.owned_embedding import OwnedEmbedding
        from relora_ds.lowrank.targets import output_head
        from relora_ds.lowrank.wrap import owned_layers
        from relora_ds.matrix.scale_update import Scale as Rule

        head, momentum = output_head(model), self.recipe.scale.momentum
        layers = owned_layers(model)
        rules = dict.fromkeys(layers, Rule("hidden", momentum=momentum))
        for name, layer in layers.items():
            if layer is head:
                rules[name] = Rule("head", momentum=momentum)
            elif isinstance(layer, OwnedEmbedding):
                rules[name] = Rule("embedding", momentum=momentum)
        return rules
