"""Whether the layers of a run will fold their low-rank products into W, as a line with the rule's numbers."""

from transformers import PretrainedConfig

from relora_ds.config import Recipe
from relora_ds.lowrank.base_format import Format
from relora_ds.lowrank.folding import flops, folds_from
from relora_ds.lowrank.formats import DTYPES
from relora_ds.lowrank.linear import ReLoRALinear
from relora_ds.lowrank.wrap import lowrank_layers
from relora_ds.methods import Method
from relora_ds.models.build import meta_model


def product_line(
    recipe: Recipe, method: Method, config: PretrainedConfig, format: Format, precision: str
) -> str | None:
    """Return what the layers of a phase do at the recipe's micro-batch; None without a linear that has a frozen W.

    Args:
        config: of the full network.
        format: of the frozen weights.
        precision: of the run: fp32, bf16 or fp16.
    """
    layers = _linears(method, config)
    if method.relora is None or not layers:
        return None
    if any(format.multiplies_codes(DTYPES[precision], layer.weight_shape) for layer in layers):
        return "product: separate, because weights multiply in fp8"
    if method.relora.lora_dropout:
        return "product: separate, because lora_dropout acts on the input of A alone"
    firsts = [
        folds_from(layer.out_features, layer.in_features, trains_A=layer.lora_A.requires_grad) for layer in layers
    ]
    least, most = min(firsts), max(firsts)
    rule = f"{least:,}" if least == most else f"{least:,} to {most:,}"
    by_shape = "" if least == most else ", by shape"
    tokens = recipe.train.micro_batch_size * recipe.data.seq_len
    folded = sum(layer.folds(tokens) for layer in layers)
    done = {0: "separate", len(layers): "folded"}.get(folded, f"folded in {folded} of {len(layers)} layers")
    asked = "" if method.relora.product == "auto" else f" by relora.product={method.relora.product}"
    rule = f"auto folds from {rule} tokens per micro-batch on{by_shape}"
    return f"product: {done}{asked} ({rule}; this run has {tokens:,})"


def saved_by_folding(method: Method, config: PretrainedConfig, tokens: int) -> float:
    """Return the FLOPs per token that folding spares a phase with micro-batches of so many tokens."""
    saved = 0
    for layer in _linears(method, config):
        if layer.folds(tokens):
            shape, trains_A = (layer.out_features, layer.in_features, layer.r, tokens), layer.lora_A.requires_grad
            separate, folded = (flops(*shape, trains_A=trains_A, folded=each) for each in (False, True))
            saved += separate - folded
    return saved / tokens


def _linears(method: Method, config: PretrainedConfig) -> list[ReLoRALinear]:
    """Return the low-rank linears of a phase that have a frozen W."""
    if method.relora is None:
        return []
    found = lowrank_layers(method.prepare(meta_model(config))).values()
    return [layer for layer in found if isinstance(layer, ReLoRALinear) and layer.weight is not None]
