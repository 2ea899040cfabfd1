"""A layer sums up the whole gradient of its W, over backward passes, in whatever layout W is."""

import functools

import pytest
import torch
from torch import nn

from relora_ds.lowrank.gradient_sum import GradientSum
from relora_ds.lowrank.linear import ReLoRALinear
from relora_ds.lowrank.owned_embedding import OwnedEmbedding
from relora_ds.lowrank.owned_linear import OwnedLinear
from relora_ds.lowrank.owned_parameter import OwnedParameter
from relora_ds.lowrank.parameter import ReLoRAParameter
from relora_ds.lowrank.reinit import OVERSAMPLED, GradientSketch

IN, OUT, R = 24, 32, 4


def filled(layer):
    torch.manual_seed(1)
    nn.init.normal_(layer.lora_A)
    nn.init.normal_(layer.lora_B)
    layer.gradient_sum = GradientSum(layer.shape_of_gradient)
    return layer


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


@pytest.mark.parametrize("product", ["separate", "folded"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("one_sided", [False, True])
def test_it_is_the_gradient_of_a_weight_that_trains(one_sided, transposed, product):
    shape = (IN, OUT) if transposed else (OUT, IN)
    weight = nn.Parameter(torch.randn(shape))
    layer = filled(
        ReLoRALinear(
            IN, OUT, weight, None, r=R, lora_alpha=8, one_sided=one_sided, transposed=transposed, product=product
        )
    )
    whole = layer.merged_weight().requires_grad_()
    for x in torch.randn(2, 3, 5, IN):  # twice, as with accumulation or a layer that is called again
        layer(x).pow(2).sum().backward()
        (x @ (whole if transposed else whole.t())).pow(2).sum().backward()
    close(layer.gradient_sum.values, whole.grad.t() if transposed else whole.grad)


def test_in_16_bit_it_is_summed_up_in_fp32():
    """Ten backward passes, of which bf16 would lose what is below 1/256 of the sum."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(OUT, IN, dtype=torch.bfloat16))
    layer = filled(ReLoRALinear(IN, OUT, weight, None, r=R, lora_alpha=8, one_sided=True, dtype=torch.bfloat16))
    expected = torch.zeros(OUT, IN, dtype=torch.float64)
    for scale in [1.0] + [1e-3] * 9:
        x, g = torch.randn(16, IN, dtype=torch.bfloat16), (scale * torch.randn(16, OUT)).bfloat16()
        layer(x).backward(g)
        expected += g.double().t() @ x.double()
    close(layer.gradient_sum.values.double(), expected, 1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_of_experts(transposed):
    shape = (3, IN, OUT) if transposed else (3, OUT, IN)
    layer = filled(
        ReLoRAParameter(
            torch.Size(shape),
            nn.Parameter(torch.randn(shape)),
            r=R,
            lora_alpha=8,
            one_sided=True,
            transposed=transposed,
        )
    )
    weight, _ = layer(torch.zeros(1))
    weight.retain_grad()
    weight.pow(2).sum().backward()
    assert layer.gradient_sum.values.shape == (3, OUT, IN)
    close(layer.gradient_sum.values, weight.grad.mT if transposed else weight.grad)


def test_a_sketch_is_taken_along_beside_it():
    layer = filled(ReLoRALinear(IN, OUT, nn.Parameter(torch.randn(OUT, IN)), None, r=R, lora_alpha=8, one_sided=True))
    rows = R + OVERSAMPLED
    layer.sketch = GradientSketch(R, IN, "key", omega=torch.eye(OUT)[:rows])
    layer(torch.randn(7, IN)).pow(2).sum().backward()
    close(layer.gradient_sum.values[:rows], layer.sketch.values)


EXPERTS = torch.Size((3, OUT, IN))
COMPILED = {
    "linear": (lambda: OwnedLinear(IN, OUT, nn.Parameter(torch.randn(OUT, IN)), None), torch.randn(2, 5, IN)),
    "low-rank linear": (
        lambda: filled(
            ReLoRALinear(IN, OUT, nn.Parameter(torch.randn(OUT, IN)), None, r=R, lora_alpha=8, one_sided=True)
        ),
        torch.randn(2, 5, IN),
    ),
    "embedding": (lambda: OwnedEmbedding(nn.Embedding(OUT, IN, padding_idx=3)), torch.arange(10).view(2, 5)),
    "experts": (lambda: OwnedParameter(EXPERTS, nn.Parameter(torch.randn(EXPERTS))), torch.randn(4)),
    "low-rank experts": (
        lambda: filled(ReLoRAParameter(EXPERTS, nn.Parameter(torch.randn(EXPERTS)), r=R, lora_alpha=8, one_sided=True)),
        torch.randn(4),
    ),
}


@pytest.mark.parametrize("kind", COMPILED)
def test_a_compiled_backward_adds_to_it(kind):
    """Although the input needs no gradient: the compiler then sees no use of what it computes."""
    make, x = COMPILED[kind]
    layer, told, found = make(), [], []
    torch._dynamo.reset()
    for compiled in (False, True):
        forward = torch.compile(layer, backend="aot_eager_decomp_partition", fullgraph=True) if compiled else layer
        layer.gradient_sum = GradientSum(layer.shape_of_gradient)
        layer.gradient_sum.added = functools.partial(told.append, compiled)
        for _ in range(2):
            y = forward(x)
            (y[0] if isinstance(y, tuple) else y).square().sum().backward()
        found.append(layer.gradient_sum.values)
    assert told == [False, False, True, True]
    assert found[0].any() and torch.equal(*found)
