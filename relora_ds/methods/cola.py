"""CoLA (arXiv 2502.10940): every linear `W·x` of attention and feed-forward becomes `B·silu(A·x)`, and all trains.

A and B are drawn from N(0, 1)·(r·(in + out))^-1/4. There is no W, nothing is frozen, and nothing is merged: to ZeRO it
is an ordinary model, with fewer parameters than the full one below r = in·out / (in + out).
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from relora_ds.methods.base import TrainingMethod

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_OF_THIS_CLASS_ALONE = ("model_type", "architectures", "auto_map", "transformers_version")


class CoLA(TrainingMethod):
    """Another network in place of the recipe's, of the same widths and depth (`architectures.relora_cola`)."""

    name = "cola"
    sections = ("cola",)
    can_warm_start = False

    @property
    def speed_key(self) -> list:
        """The rank decides the size of every product."""
        return [self.name, self.recipe.cola.r, self.recipe.cola.only_lr_activation]

    def recipe_problems(self) -> Iterator[str]:
        """Yield what has no place in a network of another architecture."""
        recipe = self.recipe
        if recipe.init_from or recipe.model.init == "pretrained":
            field = "init_from" if recipe.init_from else "model.init"
            yield (
                f"{field}: {recipe.init_from or 'pretrained'} does not fit method {self.name}, which trains factors "
                "from scratch; remove it, or train an exported CoLA network (model.name_or_path) with method=full"
            )
        if recipe.model.use_liger_kernel:
            yield (
                f"model.use_liger_kernel: true does not fit method {self.name}, for whose network liger-kernel has "
                "nothing; use false"
            )

    def recipe_warnings(self) -> Iterator[str]:
        """Yield a rank that was meant for other methods."""
        r, relora = self.recipe.cola.r, self.recipe.relora
        if relora.r not in (type(relora).r, r):
            yield f"relora.r: {relora.r} has no effect with method {self.name}, whose rank is cola.r: {r}"

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
        r, shapes = self.recipe.cola.r, {}
        for name, module in model.model.named_modules():
            if isinstance(module, nn.Linear):
                shapes[name] = tuple(module.weight.shape)
        name, shape = min(shapes.items(), key=lambda item: min(item[1]))
        if r <= min(shape):
            return []
        return [
            f"cola.r: {r} exceeds the smaller side of {name} ({'x'.join(map(str, shape))}); use cola.r <= {min(shape)}"
        ]

    def prepare(self, model: "PreTrainedModel") -> "PreTrainedModel":
        """Return the network of factors, without values."""
        import torch

        from relora_ds.architectures.relora_cola import ReLoRACoLAConfig
        from relora_ds.models.without_values import build_without_values

        values = {key: value for key, value in model.config.to_dict().items() if key not in _OF_THIS_CLASS_ALONE}
        if self.recipe.cola.only_lr_activation:
            values["hidden_act"] = "linear"
        config = ReLoRACoLAConfig(**{**values, "cola_r": self.recipe.cola.r})
        attention = model.config._attn_implementation
        return build_without_values(config, dtype=torch.float32, attn_implementation=attention)
