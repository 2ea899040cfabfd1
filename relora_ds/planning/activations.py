"""Memory of one forward and backward, traced on a network without storage: an estimate, not an account.

The real module runs on fake tensors, which have shapes and no data; every operator's results are counted while they
are alive. So the figure knows the method (a low-rank layer keeps x and x·Aᵀ), the attention kernel (fused, on the CPU
as on GPUs) and the fp32 logits of the loss. It does not know the allocator's rounding, the workspaces of
matrix-multiplication libraries, or what other devices' kernels keep. Against the peak that torch's profiler records on
a CPU it was off by 1 % (LLaMA of 4 layers, full rank and ReLoRA, fp32 and bf16); tests/planning/test_activations.py
allows 5 %.
"""

import contextlib
import copy
import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PretrainedConfig

from relora_ds.methods import Method
from relora_ds.models.build import meta_model
from relora_ds.zero.engine import DTYPES


def activation_bytes(method: Method, config: PretrainedConfig, *, precision: str, micro_batch_size: int,
                     seq_len: int, attn_implementation: str = "sdpa") -> int | None:
    """Peak bytes of a micro-step beside weights, gradients and optimizer; None for a network that cannot be traced.

    Two layers and three are traced, and the rest extrapolated: all layers of a network are alike.
    """
    config = copy.deepcopy(method.prepare(meta_model(config)).config)  # the control's network is another one
    num_layers = getattr(config, "num_hidden_layers", 0)

    def peak(layers: int) -> int:
        config.num_hidden_layers = layers
        return _traced_peak(method, config, DTYPES[precision], micro_batch_size, seq_len, attn_implementation)

    try:
        if num_layers <= 3:
            return peak(num_layers)
        two, three = peak(2), peak(3)
    except RuntimeError:  # operators whose result depends on data, such as a mixture of experts' routing
        return None
    return two + (num_layers - 2) * (three - two)


def _traced_peak(method: Method, config: PretrainedConfig, dtype: torch.dtype, micro_batch_size: int, seq_len: int,
                 attn_implementation: str) -> int:
    with FakeTensorMode():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attn_implementation)
        if method.relora is not None:
            model = method.prepare(model)
        for parameter in model.parameters():
            if parameter.requires_grad:  # gradients are in the account of the state
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
        tokens = torch.zeros(micro_batch_size, seq_len, dtype=torch.long)
        with _LiveBytes() as live:
            model(input_ids=tokens, labels=tokens).loss.backward()
    return live.peak


def _drop_gradient(parameter: torch.Tensor) -> None:
    parameter.grad = None


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators inside the block have made and that are still alive; and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
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
