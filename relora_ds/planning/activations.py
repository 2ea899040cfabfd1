"""Memory of one forward and backward, traced on a network without storage: an estimate, not an account.

The real module runs on fake tensors, which have shapes and no data; every operator's results are counted while they
are alive. So the figure knows the method (a low-rank layer keeps x and x·Aᵀ, or x·Aᵀ alone), what is computed twice,
the attention kernel (fused, on the CPU as on GPUs), the fp32 logits of the loss, and the dense copy that a product with
a packed weight makes, or a folded product. It does not know the allocator's rounding, the workspaces of
matrix-multiplication libraries, or what other devices' kernels keep. Against the peak that torch's profiler records on
a CPU it was off by 1 % (LLaMA of 4 layers, full rank and ReLoRA, fp32 and bf16); tests/planning/test_activations.py
allows 5 %.
"""

import contextlib
import copy
import functools
import weakref
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel

from relora_ds.lowrank.base_format import Format
from relora_ds.lowrank.formats import DENSE, DTYPES, format_named
from relora_ds.lowrank.gradient_sum import GradientSum
from relora_ds.lowrank.kernels import folded_weight
from relora_ds.lowrank.wrap import owned_layers
from relora_ds.methods import Method
from relora_ds.models import recompute
from relora_ds.models.build import meta_model
from relora_ds.models.loading import from_config


def activation_bytes(
    method: Method,
    config: PretrainedConfig,
    *,
    precision: str,
    micro_batch_size: int,
    seq_len: int,
    attn_implementation: str = "sdpa",
    checkpointing: str = "none",
    format: Format = DENSE,
) -> int | None:
    """Peak bytes of a micro-step beside weights, gradients and optimizer; None where they cannot be traced.

    Two layers and three are traced, and the rest extrapolated: all layers of a network are alike, or every eighth is.

    Args:
        checkpointing: none, full, selective, cheap, low_rank or inverted.
        format: of the frozen weights of the method's low-rank layers.
    """
    config = copy.deepcopy(prepared_config(method, config))  # the control's network is another one
    num_layers = getattr(config, "num_hidden_layers", 0)
    if recompute.problems(meta_model(config), checkpointing):
        return None

    def peak(layers: int) -> int:
        config.num_hidden_layers = layers
        with FakeTensorMode():
            model = from_config(config, dtype=DTYPES[precision], attn_implementation=attn_implementation)
            if method.relora is not None:
                model = cast(PreTrainedModel, store(method.prepare(model), format))
                if method.relora.residual_every is not None or method.has_owners:  # then layers keep x for backward
                    _sum_gradients(model)
            live = _traced(recompute.apply(model, checkpointing), micro_batch_size, seq_len)
        return max([live.peak, *(alive + _bytes_of(product) for product, alive in live.products.items())])

    try:
        period = recompute.period(checkpointing)
        few = 2 + (num_layers - 2) % period
        if num_layers <= few + period:
            return peak(num_layers)
        least, more = peak(few), peak(few + period)
    except (RuntimeError, ImportError):
        # Operators whose result depends on data, such as a mixture of experts' routing, or an attention implementation
        # that this machine lacks.
        return None
    return least + (num_layers - few) // period * (more - least)


def prepared_config(method: Method, config: PretrainedConfig) -> PretrainedConfig:
    """Return the configuration of the network that a method trains; the Control's is not the recipe's."""
    prepared = method.prepare(meta_model(config)).config
    assert isinstance(prepared, PretrainedConfig)
    return prepared


def store(model: nn.Module, format: Format) -> nn.Module:
    """Put the frozen weights of a model's low-rank layers into `format`, with any values; in place."""
    for layer in owned_layers(model).values():
        if layer.weight is not None:
            weight = layer.weight
            assert isinstance(weight, Tensor)
            stored = format.stored_like(layer.weight_shape, weight.dtype, weight.device)
            layer.store_weight(stored, format, as_buffer=False)
    return model


def _sum_gradients(model: nn.Module) -> None:
    for layer in owned_layers(model).values():
        layer.gradient_sum = GradientSum(layer.shape_of_gradient)


def _traced(model: nn.Module, micro_batch_size: int, seq_len: int) -> "_LiveBytes":
    for parameter in model.parameters():
        if parameter.requires_grad:  # gradients are in the account of the state
            parameter.register_post_accumulate_grad_hook(_drop_gradient)
    tokens = torch.zeros(micro_batch_size, seq_len, dtype=torch.long)
    with _LiveBytes() as live:
        model(input_ids=tokens, labels=tokens).loss.backward()
    return live


class _Product(NamedTuple):
    """`rows · Wᵀ` or `rows · W` with a frozen weight, which is one operator in a trace and several when it runs."""

    num_rows: int
    shape: torch.Size
    dtype: torch.dtype
    transposed: bool
    format: str
    folded_r: int | None  # rank of the product that is folded into W


def _product(func, args: tuple) -> _Product | None:
    if func.namespace != "relora_ds":
        return None
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
    if named.get("weight") is None:
        return None
    if transposed := "g" in named:
        rows, shape = named["g"], (named["g"].shape[1], named["lora_A"].shape[1])
    else:
        rows, shape = named["rows"], (named["lora_B"].shape[0], named["rows"].shape[1])
    lora_A, lora_B = named.get("lora_A"), named.get("lora_B")
    folded_r = None if lora_A is None or lora_B is None else lora_B.shape[1]
    return _Product(rows.shape[0], torch.Size(shape), rows.dtype, transposed, named["format"], folded_r)


@functools.cache
def _bytes_of(product: _Product) -> int:
    """Peak bytes of what it makes, its result included."""
    num_rows, shape, dtype, transposed, name, folded_r = product
    format = format_named(name)
    stored = format.stored_like(shape, dtype, "meta")
    empty = functools.partial(torch.empty, dtype=dtype, device="meta")
    rows, r = empty(num_rows, shape[not transposed]), folded_r or 0
    factors = empty(r, shape[1]), empty(shape[0], r)
    with _LiveBytes() as live:
        if folded_r is None:
            (format.multiply_transposed if transposed else format.multiply)(rows, stored, shape)
        else:
            dense = folded_weight(stored, *factors, 1.0, format)
            rows @ (dense if transposed else dense.t())
    return live.peak


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators inside the block have made and that are still alive; and their peak.

    products: what was alive, at the most, when each product with a frozen weight began.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.products: dict[_Product, int] = {}
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if (product := _product(func, args)) is not None:
            self.products[product] = max(self.now, self.products.get(product, 0))
        results = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(results):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in inputs and key not in self._alive:  # a view or an in-place result makes nothing new
                    self._alive[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, key)
        return results

    def _gone(self, key: int) -> None:
        with contextlib.suppress(KeyError):
            self.now -= self._alive.pop(key)
