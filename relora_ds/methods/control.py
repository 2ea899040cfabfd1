"""The paper's Control: a full-rank model with as many parameters as ReLoRA has *trainable* ones."""

import logging

from torch import nn

from relora_ds.lowrank.wrap import count_parameters, problems, wrap_quietly
from relora_ds.methods.base import Method
from relora_ds.models.build import meta_model, model_without_values
from relora_ds.models.control import control_config

logger = logging.getLogger(__name__)


class Control(Method):
    """A smaller network of the same family, trained at full rank. Its shape follows from the `relora.` section."""

    def problems(self, model: nn.Module) -> list[str]:
        found = problems(model, self.recipe.relora)
        if not found:
            try:
                self._shape(model)
            except ValueError as error:
                found.append(str(error))
        return found

    def prepare(self, model: nn.Module) -> nn.Module:
        config, num_trainable = self._shape(model)
        small = model_without_values(config, self.recipe.model)
        logger.info(
            "control: hidden %d, ffn %d, %d heads, %d layers: %s parameters for ReLoRA's %s trainable ones",
            config.hidden_size,
            config.intermediate_size,
            config.num_attention_heads,
            config.num_hidden_layers,
            f"{count_parameters(small)[1]:,}",
            f"{num_trainable:,}",
        )
        return small

    def _shape(self, model: nn.Module):
        """`(configuration, trainable parameters of the ReLoRA run)`."""
        num_trainable, _ = count_parameters(wrap_quietly(meta_model(model.config), self.recipe.relora))
        return control_config(model.config, num_trainable), num_trainable
