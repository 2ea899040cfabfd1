"""What runs on an emulated rank: one layer in every way that it can be stored and can compute, and what merges need."""

import itertools

import torch

from relora_ds.lowrank.formats import DTYPES, format_named
from relora_ds.lowrank.frozen import MergeLedger, add_update_, round_unbiased
from relora_ds.lowrank.linear import ReLoRALinear
from relora_ds.lowrank.pruning import count_ties, keep_mask, kth_largest_magnitude, num_kept
from relora_ds.lowrank.reinit import GradientSketch, dominant_rows
from relora_ds.lowrank.seeding import keyed_generator

IN, OUT, RANK = 64, 32, 4


def every_way(format: str) -> list[str]:
    """Train a layer of this format for a step in every way, and merge it; returns the ways."""
    device = torch.device("cuda", torch.cuda.current_device())
    ways = list(itertools.product(DTYPES, (0.0, 0.1), (False, True), (False, True)))
    for precision, dropout, sketched, biased in ways:
        layer = _layer(format, DTYPES[precision], device, dropout, biased)
        if sketched:
            layer.sketch = GradientSketch(RANK, IN, "key", device)
        _train_and_merge(layer, DTYPES[precision], device)
    return ["-".join(map(str, way)) for way in ways]


def _layer(format: str, dtype: torch.dtype, device: torch.device, dropout: float, biased: bool) -> ReLoRALinear:
    linear = torch.nn.Linear(IN, OUT, bias=biased)
    stored = format_named(format).quantize(linear.weight.detach().to(device), dtype)
    layer = ReLoRALinear(IN, OUT, linear.weight, linear.bias, r=RANK, lora_alpha=8, lora_dropout=dropout)
    for factor in (layer.lora_A, layer.lora_B):
        torch.nn.init.normal_(factor)
    layer.store_weight(stored, format_named(format), as_buffer=True)
    for name, parameter in layer.named_parameters():
        setattr(layer, name, torch.nn.Parameter(parameter.detach().to(device, dtype)))
    return layer


def _train_and_merge(layer: ReLoRALinear, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(2, 6, IN, device=device, dtype=dtype, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    base = layer.format.dequantize(layer.weight, layer.weight_shape, torch.float32)
    merged = add_update_(base.clone(), layer.lora_A.float(), layer.lora_B.float(), layer.scaling)
    stored = layer.format.quantize(round_unbiased(merged, keyed_generator("key", device)), dtype)
    lost = layer.format.dequantize(stored, merged.shape, torch.float32) - merged
    ledger = MergeLedger(merged.numel())
    ledger.add(ledger.sample(merged - base).cpu(), ledger.sample(lost).cpu())
    _prune([p.grad for p in layer.parameters()])
    for tensor in (y, x.grad, *(p.grad for p in layer.parameters()), layer.merged_weight(), stored):
        assert tensor.device == device
    if layer.sketch is not None and not layer.lora_dropout:
        assert dominant_rows(layer.sketch.values, RANK).shape == (RANK, IN)


def _prune(moments: list[torch.Tensor]) -> None:
    moments = [moment.float().flatten() for moment in moments]
    keep = [num_kept(moment.numel(), 0.9) for moment in moments]
    threshold, ties = kth_largest_magnitude(moments, keep)
    for moment, t, n, kept in zip(moments, threshold, ties, keep, strict=True):
        assert count_ties(moment, t) >= n and keep_mask(moment, t, n).sum() == kept
