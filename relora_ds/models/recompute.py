"""Activation checkpointing: what forward keeps for backward, and what backward computes a second time.

    full         every decoder layer keeps its input alone and is computed twice
    selective    of a layer, the outputs of attention and of every second large product are kept (torchtitan's policy)
    cheap        the outputs of attention and of all large products are kept; what is repeated costs little: the
                 low-rank intermediate x Aᵀ, norms, activation functions, rotary embeddings, residual sums

transformers decides what a decoder layer is; torch.utils.checkpoint repeats it, operator by operator. A low-rank
layer is two operators (`lowrank.kernels`): the small product x Aᵀ, and the large one with all that is added to it.
"""

import functools
import itertools
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

# The operators, by name: not every version of torch, and not every process, has all of them.
PRODUCTS = {
    "relora_ds::linear",
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_scaled_mm",
    "aten::_grouped_mm",
}
ATTENTION = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_flash_attention_forward",
    "aten::_efficient_attention_forward",
}


def problems(model: PreTrainedModel, mode: str) -> list[str]:
    """Return why `model` (which may be on meta) cannot be checkpointed so."""
    if mode == "none" or model.supports_gradient_checkpointing:
        return []
    return [
        f"activation_checkpointing: {mode} is not supported by transformers' {model.config.model_type} models; use "
        "activation_checkpointing=none and, for memory, a smaller train.micro_batch_size"
    ]


def apply(model: PreTrainedModel, mode: str) -> PreTrainedModel:
    """Make the decoder layers of `model` checkpoint while it trains, in place.

    Args:
        model: wrapped or not, on any device (meta and fake tensors too).
        mode: none, full, selective or cheap.

    Returns:
        The same model.

    Raises:
        ValueError: transformers does not support it for this model.
    """
    if mode == "none":
        return model
    if found := problems(model, mode):
        raise ValueError("\n".join(found))
    options: dict[str, Any] = {"use_reentrant": False}
    if mode != "full":
        options["context_fn"] = functools.partial(_contexts, mode)
    # The newer name of transformers 5, the older one warns where both are there.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
    # It would compute the gradient of frozen embeddings' output, which only reentrant checkpointing needs.
    model.disable_input_require_grads()
    return model


def _contexts(mode: str) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Return the contexts of one layer's forward and of its repetition."""
    # Some versions of torch ask again in the repetition, whose first product is the first again.
    products = {False: itertools.count(), True: itertools.count()}

    def policy(context, op, *args, **kwargs) -> CheckpointPolicy:
        keep = _is_large(op, args)
        if keep and mode == "selective" and not _is_attention(op):
            keep = next(products[context.is_recompute]) % 2 == 0
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = create_selective_checkpoint_contexts(policy)
    if torch.compiler.is_compiling():  # torch.compile asks for the decision about every operator
        return contexts
    return _LargeOperators(contexts[0]), _LargeOperators(contexts[1])


class _LargeOperators(TorchDispatchMode):
    """Show `mode` the products and attention, and hide all else from it.

    torch's modes expect the same operators in forward and in its repetition. ZeRO-3's hooks gather weights between
    those of the layer, not always at the same places. A model may change a kept tensor in place
    (`ReLU(inplace=True)`): torch refuses some of these in backward and does not see others.
    """

    def __init__(self, mode: TorchDispatchMode):
        super().__init__()
        self.mode: Any = mode  # its `storage` is of a class that torch does not export

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if _is_large(func, args):
            return self.mode.__torch_dispatch__(func, types, args, kwargs)
        if isinstance(func, OpOverload) and func._schema.is_mutable:
            self._keep_copies_of(_written(func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _keep_copies_of(self, written: list[Tensor]) -> None:
        """Keep a copy of what an in-place operation is about to change: backward repeats the operation on it."""
        storages = {tensor.untyped_storage()._cdata for tensor in written}
        for kept in tree_leaves(self.mode.storage):
            value = getattr(kept, "val", None)  # torch's record of a tensor and its version
            if isinstance(value, Tensor) and value.untyped_storage()._cdata in storages:
                kept.val = value.clone()
                kept.version = kept.val._version


def _written(func: OpOverload, args: tuple, kwargs: dict) -> list[Tensor]:
    """Return the tensors that an operator changes in place."""
    arguments = func._schema.arguments
    given = dict(zip((argument.name for argument in arguments), args, strict=False)) | kwargs
    values = [given.get(argument.name) for argument in arguments if argument.is_write]
    return [tensor for tensor in tree_leaves(values) if isinstance(tensor, Tensor)]


def _is_large(op, args) -> bool:
    if op.name() == "relora_ds::linear":
        return args[1] is not None  # without W there is s·B·h alone
    return op.name() in PRODUCTS or _is_attention(op)


def _is_attention(op) -> bool:
    # Libraries of attention kernels have namespaces of their own, by version and build: flash_attn, flash_attn_3,
    # _vllm_flash_attn3_1a2b3c4 (from the hub), torch_attn.
    namespace, found, _ = op.name().partition("::")
    return op.name() in ATTENTION or bool(found and ("attn" in namespace or "attention" in namespace))
