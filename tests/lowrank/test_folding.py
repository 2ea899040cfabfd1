"""Where layers fold the low-rank product into W, what that saves, and what backward keeps and computes."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from relora_ds.lowrank import folding, kernels
from relora_ds.lowrank.formats import DENSE, format_named
from relora_ds.lowrank.linear import ReLoRALinear
from relora_ds.lowrank.parameter import ReLoRAParameter
from relora_ds.lowrank.reinit import GradientSketch

OUT, IN, R, TOKENS = 32, 48, 4, 6

one_sided = pytest.mark.parametrize("trains_A", [True, False], ids=["both", "B"])


def _layer(product="auto", *, trains_A=True, dropout=0.0, base=True, bias=True, dtype=torch.float32):
    linear = nn.Linear(IN, OUT, bias=bias, dtype=dtype)
    weight = linear.weight if base else None
    how = {"lora_dropout": dropout, "product": product, "dtype": dtype}
    layer = ReLoRALinear(IN, OUT, weight, linear.bias, r=R, lora_alpha=2 * R, **how)
    nn.init.normal_(layer.lora_A), nn.init.normal_(layer.lora_B)
    layer.lora_A.requires_grad_(trains_A)
    return layer


class _Inside(TorchDispatchMode):
    """Run our operators as the Python that they are, so that a mode around this one sees their products."""

    KERNELS = {
        torch.ops.relora_ds.product.default: kernels._product,
        torch.ops.relora_ds.linear.default: kernels._linear,
        torch.ops.relora_ds.linear_input_grad.default: kernels._linear_input_grad,
    }

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.KERNELS.get(func, func)(*args, **(kwargs or {}))


def _counted() -> FlopCounterMode:
    in_place = {torch.ops.aten.addmm_: lambda into, a, b, **_: 2 * a[0] * a[1] * b[1]}
    return FlopCounterMode(display=False, custom_mapping=in_place)


@one_sided
@pytest.mark.parametrize("product", ["separate", "folded"])
def test_the_flops_of_a_layer_are_those_that_the_rule_counts(product, trains_A):
    layer, x = _layer(product, trains_A=trains_A), torch.randn(TOKENS, IN, requires_grad=True)
    with _counted() as counted, _Inside():
        layer(x).sum().backward()
    want = folding.flops(OUT, IN, R, TOKENS, trains_A=trains_A, folded=product == "folded")
    assert counted.get_total_flops() == want


def test_evaluation_computes_nothing_for_gradients():
    layer, x = _layer("folded"), torch.randn(TOKENS, IN)
    with torch.no_grad(), _counted() as counted, _Inside():
        layer(x)
    assert counted.get_total_flops() == 2 * (TOKENS + R) * OUT * IN


@one_sided
@pytest.mark.parametrize("shape", [(768, 768), (512, 2048), (2048, 512)])
def test_flops_are_equal_at_two_thirds_of_the_tokens_from_which_on_layers_fold(shape, trains_A):
    tokens = round(folding.folds_from(*shape, trains_A=trains_A) / folding.MARGIN)
    for r in (1, 16):
        folded, separate = (folding.flops(*shape, r, tokens, trains_A=trains_A, folded=each) for each in (True, False))
        assert folded == pytest.approx(separate, rel=1e-3)


@one_sided
def test_auto_folds_from_as_many_tokens_as_the_rule_says(trains_A):
    first = folding.folds_from(OUT, IN, trains_A=trains_A)
    layer = _layer(trains_A=trains_A)
    assert (layer.folds(first - 1), layer.folds(first)) == (False, True)
    assert _layer("folded", trains_A=trains_A).folds(1)
    assert not _layer("separate", trains_A=trains_A).folds(10 * first)
    assert not _layer("folded", base=False).folds(10 * first)  # no W to fold into


def test_a_weight_that_multiplies_in_fp8_is_not_folded():
    for dtype, folds in ((torch.float32, True), (torch.bfloat16, False)):
        layer = _layer("folded", dtype=dtype)
        format = format_named("fp8_both_layouts")
        layer.store_weight(format.quantize(layer.weight.float(), dtype), format, as_buffer=False)
        assert layer.folds(TOKENS) is folds


@one_sided
@pytest.mark.parametrize("dropout, training", [(0.0, True), (0.5, True), (0.5, False)])
def test_both_products_of_a_layer_compute_the_same(trains_A, dropout, training):
    results = []
    for product in ("separate", "folded"):
        torch.manual_seed(0)
        layer = _layer(product, trains_A=trains_A, dropout=dropout, dtype=torch.float64).train(training)
        layer.decay = torch.tensor(0.9, dtype=torch.float64)
        x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
        y = layer(x)
        y.square().sum().backward()
        results.append({"y": y, "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()})
        assert (layer.lora_A.grad is not None) is trains_A
    separate, folded = results
    assert torch.equal(separate["y"], folded["y"]) is (dropout > 0 and training)
    torch.testing.assert_close(folded, separate, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("product, dropout", [("separate", 0.0), ("folded", 0.0), ("auto", 0.5)])
def test_decay_takes_its_part_of_w_from_the_output_and_the_inputs_gradient(product, dropout, transposed):
    weight = torch.randn((IN, OUT) if transposed else (OUT, IN))
    how = {"r": R, "lora_alpha": R, "lora_dropout": dropout, "product": product, "transposed": transposed}
    layer = ReLoRALinear(IN, OUT, nn.Parameter(weight), None, **how)
    nn.init.normal_(layer.lora_A), nn.init.normal_(layer.lora_B)
    x, found = torch.randn(TOKENS, IN, requires_grad=True), []
    for decay in (None, torch.tensor(0.75)):
        layer.decay = decay
        torch.manual_seed(0)  # of the mask
        y = layer(x)
        found.append((y, *torch.autograd.grad(y.sum(), x)))
    plain = weight.t() if transposed else weight
    torch.testing.assert_close(found[0][0] - found[1][0], 0.25 * x @ plain.t(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[0][1] - found[1][1], 0.25 * plain.sum(0).expand(TOKENS, IN), rtol=1e-4, atol=1e-4)


def kept_bytes(layer: ReLoRALinear, x: torch.Tensor) -> int:
    """Bytes that autograd saves for backward, the layer's own tensors left out."""
    own = {t.untyped_storage().data_ptr() for t in layer.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    assert y.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize("product", ["separate", "folded"])
def test_a_one_sided_layer_keeps_r_numbers_a_token_and_its_input_only_for_a_sketch(product):
    x = torch.randn(TOKENS, IN, requires_grad=True)
    assert kept_bytes(_layer(product), x) == 4 * TOKENS * (IN + R)
    layer = _layer(product, trains_A=False)
    assert kept_bytes(layer, x) == 4 * TOKENS * R
    layer.sketch = GradientSketch(R, IN, "key")
    assert kept_bytes(layer, x) == 4 * TOKENS * (IN + R)


@pytest.mark.parametrize("product", ["separate", "folded"])
def test_a_sketch_of_a_one_sided_layer_is_that_of_both_factors(product):
    x, sketches = torch.randn(TOKENS, IN), []
    for trains_A in (True, False):
        torch.manual_seed(0)
        layer = _layer(product, trains_A=trains_A)
        layer.sketch = GradientSketch(R, IN, "key")
        layer(x).square().sum().backward()
        sketches.append(layer.sketch.values)
    assert sketches[0].any() and torch.equal(*sketches)


@one_sided
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("format", [DENSE, format_named("int8")])
def test_the_sum_of_a_parameter_decays_its_weight_and_trains_what_trains(format, transposed, trains_A):
    shape = torch.Size([2, IN, OUT] if transposed else [2, OUT, IN])
    weight = torch.randn(shape)
    layer = ReLoRAParameter(shape, nn.Parameter(weight.clone()), r=R, lora_alpha=2 * R, transposed=transposed)
    nn.init.normal_(layer.lora_A), nn.init.normal_(layer.lora_B)
    layer.lora_A.requires_grad_(trains_A)
    if format is not DENSE:
        layer.store_weight(format.quantize(weight, torch.float32), format, as_buffer=False)
        weight = format.dequantize(layer.weight, shape, torch.float32).clone()
    update = 2 * layer.lora_B @ layer.lora_A
    plain, _ = layer(layer.lora_B)
    torch.testing.assert_close(plain, weight + (update.mT if transposed else update))
    layer.decay = torch.tensor(0.9)
    decayed, _ = layer(layer.lora_B)
    torch.testing.assert_close(plain - decayed, 0.1 * weight)
    decayed.sum().backward()
    assert layer.lora_B.grad is not None and (layer.lora_A.grad is not None) is trains_A
