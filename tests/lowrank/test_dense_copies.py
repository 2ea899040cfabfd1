"""How long a dequantized weight lives, also in compiled layers."""

import weakref

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from relora_ds.lowrank import kernels
from relora_ds.lowrank.formats import format_named
from relora_ds.lowrank.linear import ReLoRALinear
from tests.lowrank.test_kernels import FORMATS, RHO


class _LiveWeights(TorchDispatchMode):
    """How many storages as large as a dense weight live, of those made inside the block; and the most at a time.

    Our operators are run as the Python that they are, so that what they make inside is seen.
    """

    KERNELS = {
        torch.ops.relora_ds.product.default: kernels._product,
        torch.ops.relora_ds.linear.default: kernels._linear,
        torch.ops.relora_ds.linear_input_grad.default: kernels._linear_input_grad,
    }

    def __init__(self, size):
        super().__init__()
        self.size, self.most, self.num_made, self.alive = size, 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.KERNELS:
            with self:
                return self.KERNELS[func](*args, **(kwargs or {}))
        results = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if storage.nbytes() >= self.size and key not in inputs | self.alive:
                    self.alive.add(key)
                    self.num_made += 1
                    self.most = max(self.most, len(self.alive))
                    weakref.finalize(storage, self.alive.discard, key)
        return results


def _layers(name, dropout=0.0, num_layers=3, product="separate"):
    how = {"r": 2, "lora_alpha": 2, "lora_dropout": dropout, "product": product}
    layers = [ReLoRALinear(64, 64, nn.Parameter(torch.randn(64, 64) / 8), None, **how) for _ in range(num_layers)]
    for layer in layers:
        nn.init.normal_(layer.lora_A), nn.init.normal_(layer.lora_B)
        if name != "dense":
            layer.store_weight(
                format_named(name).quantize(layer.weight, torch.float32), format_named(name), as_buffer=False
            )
    return nn.Sequential(*layers)


@pytest.mark.parametrize("dropout, product", [(0.0, "separate"), (0.5, "separate"), (0.0, "folded")])
@pytest.mark.parametrize("name", FORMATS)
def test_one_layers_dense_weight_lives_at_a_time_and_none_between_forward_and_backward(name, dropout, product):
    model, x = _layers(name, dropout, product=product), torch.randn(4, 64, requires_grad=True)
    with _LiveWeights(64 * 64 * 4) as live:
        y = model(x)
        assert live.alive == set()
        y.sum().backward()
        assert live.alive == set()
    # Once for each product; where the stored weight already is fp32, nothing is made without folding.
    assert (live.most, live.num_made) == ((0, 0) if name in ("dense", "fp32") and product != "folded" else (1, 6))
    assert x.grad is not None and all(layer.lora_A.grad is not None for layer in model)


def test_the_count_of_live_weights_sees_a_kept_copy():
    with _LiveWeights(64 * 64 * 4) as live:
        kept = [torch.ones(64, 64) * 2 for _ in range(2)]
        assert len(live.alive) == 2 == live.num_made // 2
    del kept


def _compiled(model):
    """`model` compiled without a graph break, and what its graphs compute: `[(name of the target, value), ...]`."""
    from torch._dynamo.backends.common import aot_autograd

    graphs = []

    def keep(graph, example_inputs):
        graphs.append([(str(node.target), node.op, node.meta.get("val")) for node in graph.graph.nodes])
        return graph

    return torch.compile(model, fullgraph=True, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep)), graphs


@pytest.mark.each_value_once
@pytest.mark.parametrize(
    "name, dropout, product",
    [(name, dropout, "separate") for name in FORMATS for dropout in (0.0, 0.5)]
    + [("dense", 0.0, "folded"), ("int8", 0.0, "folded")],
)
def test_compiled_layers_keep_no_dense_weight_and_a_restart_does_not_recompile(name, dropout, product):
    torch._dynamo.reset()
    model = _layers(name, dropout, num_layers=2, product=product)
    decay = torch.tensor(RHO)
    for layer in model:
        layer.decay = decay
    compiled, graphs = _compiled(model)
    x = torch.randn(4, 64, requires_grad=True)

    def step(function):
        model.zero_grad()
        torch.manual_seed(0)
        function(x).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]

    for _ in range(3):
        if not dropout:  # compiled code may draw other masks
            for got, want in zip(step(compiled), step(model), strict=True):
                torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)
        else:
            step(compiled)
        with torch.no_grad():  # a restart: new values in the same tensors
            for layer in model:
                value = torch.randn(64, 64)
                layer.weight.copy_(layer.format.quantize(value, torch.float32))
                layer.lora_A.normal_()
            decay.mul_(RHO)
    assert len(graphs) == 2  # forward and backward, compiled once
    for graph in graphs:
        made = [
            (target, value.shape)
            for target, op, value in graph
            if op == "call_function" and isinstance(value, torch.Tensor) and value.numel() >= 64 * 64
        ]
        assert made == []  # a dense weight exists inside of our operators only
        assert sum("relora_ds.linear" in target for target, _, _ in graph) == (4 if dropout else 2)  # W x and B A x


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dense", "int8", "fp8", "nf4"])
def test_the_default_compiler(name):
    torch._dynamo.reset()
    model = _layers(name)
    compiled, x = torch.compile(model, fullgraph=True), torch.randn(4, 64)
    torch.testing.assert_close(compiled(x), model(x), atol=1e-3, rtol=1e-4)
    compiled(x).sum().backward()
