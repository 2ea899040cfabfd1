"""The paper's Control: a full-rank model with as many parameters as ReLoRA has *trainable* ones."""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

from relora_ds.methods.base import TrainingMethod

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

logger = logging.getLogger(__name__)


class Control(TrainingMethod):
    """A smaller network of the same family, trained at full rank. Its shape follows from the `relora.` section."""

    name = "control"
    can_warm_start = False

    @property
    def speed_key(self) -> list:
        """The size of the network follows from what ReLoRA would train."""
        relora = self.recipe.relora
        return [self.name, relora.r, relora.target_modules, relora.trainable_modules]

    def recipe_problems(self) -> Iterator[str]:
        """Yield what has no place in a network that is made for the purpose."""
        recipe = self.recipe
        if recipe.init_from or recipe.model.init == "pretrained":
            field = "init_from" if recipe.init_from else "model.init"
            yield (
                f"{field}: {recipe.init_from or 'pretrained'} does not fit method control, which trains a smaller "
                "network from scratch; use method=full, or remove it"
            )

    def problems(self, model: "PreTrainedModel") -> list[str]:
        """Return why ReLoRA cannot train `model`, or why no smaller network has as many parameters."""
        from relora_ds.lowrank.wrap import problems

        found = problems(model, self.recipe.relora)
        if not found:
            try:
                self._shape(model)
            except ValueError as error:
                found.append(str(error))
        return found

    def prepare(self, model: "PreTrainedModel") -> "PreTrainedModel":
        """Return the smaller network."""
        from relora_ds.lowrank.wrap import count_parameters
        from relora_ds.models.build import model_without_values

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

    def _shape(self, model: "PreTrainedModel") -> "tuple[PretrainedConfig, int]":
        """Return (configuration, trainable parameters of the ReLoRA run)."""
        from relora_ds.lowrank.wrap import count_parameters, wrap_quietly
        from relora_ds.models.build import meta_model
        from relora_ds.models.control_shape import control_config

        num_trainable, _ = count_parameters(wrap_quietly(meta_model(model.config), self.recipe.relora))
        return control_config(model.config, num_trainable), num_trainable
