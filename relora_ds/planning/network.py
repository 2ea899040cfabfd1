"""The network of a recipe without its weights, and the sizes that decide memory and traffic."""

import dataclasses
from pathlib import Path

from transformers import AutoConfig, PretrainedConfig

from relora_ds.config import Recipe
from relora_ds.data.pretokenized import read_metadata
from relora_ds.data.tokenizer import load as load_tokenizer
from relora_ds.lowrank.wrap import is_lora_parameter, lowrank_layers
from relora_ds.methods import Method
from relora_ds.models.build import build_config, meta_model


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes of parameters, in elements.

    Attributes:
        groups: the optimizer groups in order, each with the sizes of its parameters.
        frozen: every frozen parameter.
        merged: the frozen weights that low-rank updates are merged into, by layer; part of `frozen`.
        factors: `lora_A` and `lora_B` of those layers; part of `groups`.
    """

    groups: tuple[tuple[int, ...], ...]
    frozen: tuple[int, ...]
    merged: dict[str, int]
    factors: tuple[int, ...]

    @property
    def num_trainable(self) -> int:
        """T."""
        return sum(map(sum, self.groups))

    @property
    def num_frozen(self) -> int:
        """F."""
        return sum(self.frozen)


def network_of(recipe: Recipe) -> tuple[PretrainedConfig, str]:
    """`(configuration of the full network, a line that says where its vocabulary comes from)`.

    Nothing is downloaded but the configuration of a model that the recipe names on the hub. The tokenizer is read
    where it is a local directory. ValueError: see `build_config`.
    """
    vocab_size, source = _vocabulary(recipe)
    model = dataclasses.replace(recipe.model, init="random")  # the weights of a pretrained one are not looked at
    config = build_config(model, vocab_size, recipe.data.seq_len, trust_remote_code=recipe.trust_remote_code)
    return config, f"vocabulary: {vocab_size:,} ({source})"


def _vocabulary(recipe: Recipe) -> tuple[int, str]:
    name = recipe.data.tokenizer
    if recipe.model.init == "pretrained":
        known = AutoConfig.from_pretrained(recipe.model.name_or_path, trust_remote_code=recipe.trust_remote_code)
        return known.vocab_size, f"that of the pretrained {recipe.model.name_or_path}"
    if recipe.data.source == "pretokenized":
        return read_metadata(recipe.data.path)["vocab_size"], f"that of {recipe.data.path}"
    if name is None:
        return recipe.data.vocab_size, "data.vocab_size; the tokenizer is trained when the run starts"
    if Path(name).expanduser().is_dir():
        return len(load_tokenizer(name)), f"tokenizer {name}"
    return recipe.data.vocab_size, (f"data.vocab_size; tokenizer {name} is not loaded: set data.vocab_size to its "
                                    "size for exact figures")


def shapes_of(method: Method, config: PretrainedConfig) -> Shapes:
    """The sizes of what `method` trains and freezes, counted on a network without storage."""
    model = method.prepare(meta_model(config))
    layers = {name: layer for name, layer in lowrank_layers(model).items() if layer.weight is not None}
    return Shapes(
        groups=tuple(tuple(p.numel() for p in group["params"]) for group in method.param_groups(model)),
        frozen=tuple(p.numel() for p in model.parameters() if not p.requires_grad),
        merged={name: layer.weight.numel() for name, layer in layers.items()},
        factors=tuple(p.numel() for layer in layers.values()
                      for name, p in layer.named_parameters() if is_lora_parameter(name)))
