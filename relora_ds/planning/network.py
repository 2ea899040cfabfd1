"""The network of a recipe without its weights, and the sizes that decide memory and traffic."""

import dataclasses
from pathlib import Path
from typing import cast

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from relora_ds.config import Recipe
from relora_ds.data.pretokenized import read_metadata
from relora_ds.data.tokenizer import load as load_tokenizer
from relora_ds.data.tokenizer import num_ids
from relora_ds.lowrank.base_layer import LowRankLayer
from relora_ds.lowrank.wrap import owned_layers
from relora_ds.matrix.factored import FactoredOptimizer
from relora_ds.matrix.optimizer import MatrixOptimizer
from relora_ds.methods import Method
from relora_ds.models.build import build_config, meta_model
from relora_ds.models.loading import load_config
from relora_ds.zero.optimizers import groups_for


@dataclasses.dataclass(frozen=True)
class Shapes:
    """Sizes of parameters, in weights: what a frozen one is stored in is decided in `storage`.

    Attributes:
        groups: the optimizer groups in order, each with the sizes of its parameters.
        merged: the shapes of the frozen weights that low-rank updates are merged into, by layer.
        frozen: the other frozen parameters, which never change.
        factors: elements of `lora_A` and of `lora_B` of these layers; what of them trains is part of `groups`.
        bases: elements of the `lora_A` that are frozen, by layer: all of them, or none.
        repeated, repeated_merged: what trains, and the layers of `merged`, in all decoder layers but the last. Where
            activations are checkpointed, ZeRO-3 gathers these for the repetition too; the last layer is still there.
        owner_state: bytes that the owner of the weight of a layer remembers for its updates, by layer: of all of
            `merged`, or of none.
        owner_kept: bytes that the owner keeps beside it, on its device alone, likewise.
        shared_factors: bytes of the factors of a weight, by layer, which all ranks hold and owners update: of all of
            `merged`, or of none.
        factors_sent: bytes of what a step changes of them, likewise.
        in_8_bit: of each of `groups`, whether its moments are; () where none are.
        looked_up: elements that train, and frozen ones, of an input embedding that nothing is multiplied with.
    """

    groups: tuple[tuple[int, ...], ...]
    merged: dict[str, torch.Size]
    frozen: tuple[int, ...]
    factors: tuple[tuple[int, int], ...]
    bases: dict[str, int] = dataclasses.field(default_factory=dict)
    repeated: tuple[int, ...] = ()
    repeated_merged: frozenset[str] = frozenset()
    looked_up: tuple[int, int] = (0, 0)
    in_8_bit: tuple[bool, ...] = ()
    owner_state: dict[str, int] = dataclasses.field(default_factory=dict)
    owner_kept: dict[str, int] = dataclasses.field(default_factory=dict)
    shared_factors: dict[str, int] = dataclasses.field(default_factory=dict)
    factors_sent: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def num_trainable(self) -> int:
        """T, what DeepSpeed's optimizer trains."""
        return sum(map(sum, self.groups))

    @property
    def num_owned(self) -> int:
        """Elements of the frozen weights that owners train."""
        return sum(self.merged[name].numel() for name in self.owner_state)

    @property
    def num_frozen(self) -> int:
        """F."""
        merged = sum(shape.numel() for shape in self.merged.values())
        return sum(self.frozen) + sum(self.bases.values()) + merged

    @property
    def trained_factors(self) -> tuple[int, ...]:
        """Elements of each factor that trains."""
        return (
            tuple(B for _, B in self.factors) if self.bases else tuple(size for pair in self.factors for size in pair)
        )


def network_of(recipe: Recipe) -> tuple[PretrainedConfig, str]:
    """Return `(configuration of the full network, a line that says where its vocabulary comes from)`.

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
        assert recipe.model.name_or_path is not None  # the recipe's checks have said so
        known = load_config(recipe.model.name_or_path, recipe.trust_remote_code)
        return known.vocab_size, f"that of the pretrained {recipe.model.name_or_path}"
    for part in recipe.data.parts():
        if part.source == "pretokenized" and (name is None or recipe.data.mix is None):
            return read_metadata(part.path)["vocab_size"], f"that of {part.path}"
    if name is None:
        return recipe.data.vocab_size, "data.vocab_size; the tokenizer is trained when the run starts"
    if Path(name).expanduser().is_dir():
        return num_ids(load_tokenizer(name, recipe.trust_remote_code)), f"tokenizer {name}"
    return recipe.data.vocab_size, (
        f"data.vocab_size; tokenizer {name} is not loaded: set data.vocab_size to its size for exact figures"
    )


def shapes_of(method: Method, config: PretrainedConfig) -> Shapes:
    """Return the sizes of what `method` trains and freezes, counted on a network without storage."""
    model = cast(PreTrainedModel, method.prepare(meta_model(config)))
    layers = {name: layer for name, layer in owned_layers(model).items() if layer.weight is not None}
    lowrank = {name: layer for name, layer in layers.items() if isinstance(layer, LowRankLayer)}
    bases = {name: layer for name, layer in lowrank.items() if layer.one_sided}
    of_layers = {id(layer.weight) for layer in layers.values()} | {id(layer.lora_A) for layer in bases.values()}
    layered = [f"{name}." for name, module in model.named_modules() if isinstance(module, GradientCheckpointingLayer)]
    repeated = tuple(layered[:-1])
    embedding = cast(Tensor, model.get_input_embeddings().weight)
    head = model.get_output_embeddings()
    looked_up = 0 if head is not None and head.weight is embedding else embedding.numel()
    rules = method.matrix_optimizers(model) or {}
    owned = {id(layers[name].weight) for name in rules}
    states = {name: _state_bytes(rule, layers[name].shape_of_gradient) for name, rule in rules.items()}
    groups = groups_for(method.recipe.optim.name, method.param_groups(model), model)
    return Shapes(
        groups=tuple(tuple(p.numel() for p in group["params"]) for group in groups),
        in_8_bit=tuple(group.get("optim_bits") == 8 for group in groups),
        merged={name: layer.weight_shape for name, layer in layers.items()},
        frozen=tuple(p.numel() for p in model.parameters() if not p.requires_grad and id(p) not in of_layers),
        factors=tuple((layer.lora_A.numel(), layer.lora_B.numel()) for layer in lowrank.values()),
        bases={name: layer.lora_A.numel() for name, layer in bases.items()},
        owner_state={name: owned - shared for name, (owned, shared, _) in states.items()},
        owner_kept={name: rule.kept_bytes(layers[name].shape_of_gradient) for name, rule in rules.items()},
        shared_factors={name: shared for name, (_, shared, _) in states.items() if shared},
        factors_sent={name: sent for name, (_, _, sent) in states.items() if sent},
        repeated=tuple(
            p.numel() for name, p in model.named_parameters() if p.requires_grad and name.startswith(repeated)
        ),
        repeated_merged=frozenset(name for name in layers if name.startswith(repeated)),
        looked_up=(looked_up, 0) if embedding.requires_grad or id(embedding) in owned else (0, looked_up),
    )


def _state_bytes(rule: MatrixOptimizer, shape: torch.Size) -> tuple[int, int, int]:
    """Return bytes of a weight's state, of what all ranks hold of it, and of what a step changes of that."""
    state = rule.begin(shape, "meta")
    owned = sum(value.nbytes for value in state.values())
    if not isinstance(rule, FactoredOptimizer):
        return owned, 0, 0
    return owned, sum(state[name].nbytes for name in rule.shared), rule.changed(state).nbytes
