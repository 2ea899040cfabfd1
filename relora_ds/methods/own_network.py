"""What methods have in common that train another network in place of the recipe's LLaMA, of the same widths and depth.

The networks are those of `relora_ds.architectures`. All of a network trains, from scratch; nothing is merged.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from relora_ds.methods.base import TrainingMethod

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_OF_THIS_CLASS_ALONE = ("model_type", "architectures", "auto_map", "transformers_version")


class OwnNetwork(TrainingMethod):
    """Training of a network whose linears have factors of one rank.

    Attributes:
        network: what the authors call it.
    """

    can_warm_start = False
    network: ClassVar[str]

    @property
    def _section(self) -> str:
        (section,) = self.sections
        return section

    @property
    def _r(self) -> int:
        return getattr(self.recipe, self._section).r

    def config(self, values: Mapping[str, Any]) -> "PretrainedConfig":
        """Return the configuration of the network for `values`, those of the LLaMA."""
        raise NotImplementedError

    def recipe_problems(self) -> Iterator[str]:
        """Yield what has no place in a network of another architecture."""
        recipe = self.recipe
        if recipe.init_from or recipe.model.init == "pretrained":
            field = "init_from" if recipe.init_from else "model.init"
            yield (
                f"{field}: {recipe.init_from or 'pretrained'} does not fit method {self.name}, which trains factors "
                f"from scratch; remove it, or train an exported {self.network} network (model.name_or_path) with "
                "method=full"
            )
        if recipe.model.use_liger_kernel:
            yield (
                f"model.use_liger_kernel: true does not fit method {self.name}, for whose network liger-kernel has "
                "nothing; use false"
            )

    def recipe_warnings(self) -> Iterator[str]:
        """Yield a rank that was meant for other methods."""
        relora = self.recipe.relora
        if relora.r not in (type(relora).r, self._r):
            yield (
                f"relora.r: {relora.r} has no effect with method {self.name}, whose rank is {self._section}.r: "
                f"{self._r}"
            )

    def problems(self, model: "PreTrainedModel") -> list[str]:
        """Return why `model` is none whose linears can become factors, or too narrow for the rank."""
        from torch import nn
        from transformers import LlamaForCausalLM

        if type(model) is not LlamaForCausalLM:
            return [
                f"method: {self.name} builds LLaMA's layers, with a linear for each of q, k, v, o, gate, up and down, "
                f"and this is a {model.config.model_type} model; use a LLaMA, such as model.preset=llama_60m, or "
                "another method"
            ]
        shapes = {}
        for name, module in model.model.named_modules():
            if isinstance(module, nn.Linear):
                shapes[name] = tuple(module.weight.shape)
        if not shapes:
            return [
                f"method: {self.name} puts factors into layers, and this model has none (num_hidden_layers: 0); use a "
                "deeper one"
            ]
        name, shape = min(shapes.items(), key=lambda item: min(item[1]))
        if self._r <= min(shape):
            return []
        return [
            f"{self._section}.r: {self._r} exceeds the smaller side of {name} ({'x'.join(map(str, shape))}); use "
            f"{self._section}.r <= {min(shape)}"
        ]

    def prepare(self, model: "PreTrainedModel") -> "PreTrainedModel":
        """Return the network of factors, without values."""
        import torch

        from relora_ds.models.without_values import build_without_values

        values = {key: value for key, value in model.config.to_dict().items() if key not in _OF_THIS_CLASS_ALONE}
        attention = model.config._attn_implementation
        return build_without_values(self.config(values), dtype=torch.float32, attn_implementation=attention)
