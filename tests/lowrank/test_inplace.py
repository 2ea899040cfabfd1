"""In-place operations around a low-rank layer: as around `nn.Linear`, the right numbers or autograd's own error."""

import functools

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from relora_ds.lowrank.formats import format_named
from relora_ds.lowrank.linear import ReLoRALinear
from relora_ds.models import recompute

FORMATS = ["dense", "bf16", "int8", "fp8", "nf4"]
SIZE, R = 64, 4


def low_rank(format="dense", *, dropout=0.0, base=True, bias=True) -> ReLoRALinear:
    linear = nn.Linear(SIZE, SIZE, bias=bias)
    layer = ReLoRALinear(
        SIZE, SIZE, linear.weight if base else None, linear.bias, r=R, lora_alpha=8, lora_dropout=dropout
    )
    nn.init.normal_(layer.lora_A, std=0.1), nn.init.normal_(layer.lora_B, std=0.1)
    if base and format != "dense":
        packed = format_named(format)
        layer.store_weight(packed.quantize(layer.weight.detach(), torch.float32), packed, as_buffer=False)
    return layer


def in_place(y):
    y.mul_(3)
    y += 0.5 * y.detach()
    y[..., :3].zero_()
    return y.relu_()


def out_of_place(y):
    y = y * 3
    y = y + 0.5 * y.detach()
    y = torch.cat([torch.zeros_like(y[..., :3]), y[..., 3:]], -1)
    return y.relu()


def value_and_gradients(function, layer, x):
    torch.manual_seed(3)
    y = function(layer(x))
    leaves = [leaf for leaf in (x, *layer.parameters()) if leaf.requires_grad]
    return y.detach(), *torch.autograd.grad(y.sin().sum(), leaves)


def assert_same(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("format", [*FORMATS, None], ids=str)
def test_the_output_may_be_changed_in_place(format, dropout):
    layer = low_rank(format, dropout=dropout, base=format is not None, bias=not dropout)
    for shape in ((), (5,), (2, 3), (2, 1, 3), (0,), (2, 0)):
        for needs_grad in (True, False):
            x = torch.randn(*shape, SIZE, requires_grad=needs_grad)
            assert not layer(x)._is_view()
            assert_same(value_and_gradients(in_place, layer, x), value_and_gradients(out_of_place, layer, x))
    x = torch.randn(SIZE, 3, 2, requires_grad=True).permute(2, 1, 0)  # not contiguous
    assert_same(value_and_gradients(in_place, layer, x), value_and_gradients(out_of_place, layer, x))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_the_output_may_be_changed_in_place_without_gradients(context):
    layer, x = low_rank(), torch.randn(2, 3, SIZE)
    with context():
        torch.testing.assert_close(in_place(layer(x)), out_of_place(layer(x)))


def test_a_network_with_in_place_activations_and_residuals():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down, self.act = low_rank(), low_rank(), nn.ReLU(inplace=True)

        def forward(self, x):
            y = self.down(self.act(self.up(x)))
            y += x
            return y

    model, x = nn.Sequential(Block(), Block()), torch.randn(2, 3, SIZE)
    leaves = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(model(x).sin().sum(), leaves)
    y = x
    for block in model:
        y = block.down(block.up(y).relu()) + y
    assert_same(found, torch.autograd.grad(y.sin().sum(), leaves))


@pytest.mark.parametrize("shape", [(5, SIZE), (2, 3, SIZE), (SIZE,)])
def test_an_input_that_is_changed_before_backward_is_refused_as_by_nn_linear(shape):
    for layer in (nn.Linear(SIZE, SIZE), low_rank(), low_rank("int8"), low_rank(base=False)):
        x = torch.randn(shape, requires_grad=True) * 1
        loss = layer(x).sum()
        x.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def test_a_copied_input_may_be_changed():
    """Of an input that is not contiguous the layer keeps a copy; with dropout it keeps the dropped values."""
    for layer, strided in ((low_rank(), True), (low_rank(dropout=0.5), False)):
        found = []
        for changes in (False, True):
            torch.manual_seed(0)
            x = torch.randn(SIZE, 3, 2).permute(2, 1, 0) if strided else torch.randn(2, 3, SIZE)
            y = layer(x)
            if changes:
                x.zero_()
            found.append(torch.autograd.grad(y.sin().sum(), [layer.lora_A, layer.lora_B]))
        assert_same(*found)


@pytest.mark.parametrize("format", ["dense", "int8"])
def test_compiled(format):
    torch._dynamo.reset()
    layer, x = low_rank(format), torch.randn(2, 3, SIZE, requires_grad=True)

    def function(x):
        return in_place(layer(x))

    def gradients(call):
        y = call(x)
        return y.detach(), *torch.autograd.grad(y.sin().sum(), [x, layer.lora_A, layer.lora_B])

    assert_same(gradients(torch.compile(function, backend="aot_eager", fullgraph=True)), gradients(function))


@pytest.mark.parametrize(
    "make",
    [low_rank, functools.partial(low_rank, "int8"), functools.partial(nn.Linear, SIZE, SIZE, bias=False)],
    ids=["dense", "int8", "full"],
)
@pytest.mark.parametrize("mode", ["full", "selective", "cheap"])
def test_checkpointing_repeats_from_what_was_there_before_the_change(mode, make):
    layers, x = nn.ModuleList(make() for _ in range(3)), torch.randn(2, 3, SIZE, requires_grad=True)
    leaves = [x, *(p for p in layers.parameters() if p.requires_grad)]

    def function(x):
        for layer in layers:
            y = layer(x)
            y += 1  # the second change would be seen in the numbers
            x = y.relu_() * x
        return x

    context = {} if mode == "full" else {"context_fn": functools.partial(recompute._contexts, mode)}
    y = checkpoint(function, x, use_reentrant=False, **context)
    found = torch.autograd.grad(y.sin().sum(), leaves)
    assert_same(found, torch.autograd.grad(function(x).sin().sum(), leaves))


def test_transforms_that_the_layer_has_no_rule_for_are_refused():
    layer, x = low_rank(), torch.randn(3, SIZE)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.vmap(layer)(x)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: layer(x).sum())(x)
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward mode AD"):
        layer(forward_ad.make_dual(x, torch.ones_like(x)))
