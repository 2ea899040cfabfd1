"""Activation checkpointing: what forward keeps for backward, and what backward computes a second time.

    full         every decoder layer keeps its input alone and is computed twice
    selective    of a layer, the outputs of attention and of every second large product are kept (torchtitan's policy)
    cheap        the outputs of attention and of all large products are kept; what is repeated costs little: the
                 low-rank intermediate x Aᵀ, norms, activation functions, rotary embeddings, residual sums
    low_rank     the layer's input and these x Aᵀ are kept, and all that is wide is repeated: CoLA-M's policy
    inverted     the same, but a CR-Net's layer does not keep what the layer before has computed (`models.inversion`)

transformers decides what a decoder layer is; torch.utils.checkpoint repeats it, operator by operator. A low-rank
layer is two operators (`lowrank.kernels`): the small product x Aᵀ, and the large one with all that is added to it. In
a CoLA network or a CR-Net x Aᵀ is a plain product, known by the shape of Aᵀ.
"""

import functools
import itertools
from collections.abc import Callable, Set
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from relora_ds.architectures import ReLoRACRNetForCausalLM
from relora_ds.architectures.relora_cola import CoLALinear
from relora_ds.architectures.relora_crnet import CRNetLinear
from relora_ds.models import inversion

LOW_RANK, INVERTED = "low_rank", "inverted"
Shapes: TypeAlias = Set[tuple[int, ...]]
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
    """Return why `model` (which may be on meta), as it will train, cannot be checkpointed so."""
    if mode == INVERTED and not isinstance(model, ReLoRACRNetForCausalLM):
        return [
            "activation_checkpointing: inverted finds what the layer before has computed from the layer's own output, "
            f"which only a CR-Net allows, and a {model.config.model_type} model trains; use low_rank, or method=crnet"
        ]
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
        mode: none, full, selective, cheap, low_rank or inverted.

    Returns:
        The same model.

    Raises:
        ValueError: transformers does not support it for this model, or it is inverted and the model is no CR-Net.
    """
    if mode == "none":
        return model
    if found := problems(model, mode):
        raise ValueError("\n".join(found))
    options: dict[str, Any] = {"use_reentrant": False}
    if mode != "full":
        options["context_fn"] = functools.partial(_contexts, mode, _shapes_of_A(model))
    # The newer name of transformers 5, the older one warns where both are there.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable(options)
    # It would compute the gradient of frozen embeddings' output, which only reentrant checkpointing needs.
    model.disable_input_require_grads()
    if mode == INVERTED:
        inversion.apply(cast(ReLoRACRNetForCausalLM, model))
    return model


def period(mode: str) -> int:
    """Return after how many layers what is kept of a layer repeats itself."""
    return inversion.EVERY if mode == INVERTED else 1


def _shapes_of_A(model: PreTrainedModel) -> Shapes:
    """Return the shapes `(in, r)` of the Aᵀ that a CoLA network or a CR-Net multiplies with."""
    return {(layer.in_features, layer.r) for layer in model.modules() if isinstance(layer, CoLALinear | CRNetLinear)}


def _contexts(mode: str, shapes_of_A: Shapes = frozenset()) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Return the contexts of one layer's forward and of its repetition."""
    # Some versions of torch ask again in the repetition, whose first product is the first again.
    products = {False: itertools.count(), True: itertools.count()}
    may_be_kept = functools.partial(_is_low_rank, shapes_of_A) if mode in (LOW_RANK, INVERTED) else _is_large

    def policy(context, op, *args, **kwargs) -> CheckpointPolicy:
        keep = may_be_kept(op, args)
        if keep and mode == "selective" and not _is_attention(op):
            keep = next(products[context.is_recompute]) % 2 == 0
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = create_selective_checkpoint_contexts(policy)
    if torch.compiler.is_compiling():  # torch.compile asks for the decision about every operator
        return contexts
    return _Shown(contexts[0], may_be_kept), _Shown(contexts[1], may_be_kept)


class _Shown(TorchDispatchMode):
    """Show `mode` the operators whose results may be kept, and hide all else from it.

    torch's modes expect the same operators in forward and in its repetition. ZeRO-3's hooks gather weights between
    those of the layer, not always at the same places. A model may change a kept tensor in place
    (`ReLU(inplace=True)`): torch refuses some of these in backward and does not see others.
    """

    def __init__(self, mode: TorchDispatchMode, may_be_kept: Callable[[Any, tuple], bool]):
        super().__init__()
        self.mode: Any = mode  # its `storage` is of a class that torch does not export
        self.may_be_kept = may_be_kept

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if self.may_be_kept(func, args):
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


def _is_low_rank(shapes_of_A: Shapes, op, args) -> bool:
    return op.name() == "relora_ds::product" or (op.name() == "aten::mm" and tuple(args[1].shape) in shapes_of_A)


def _is_attention(op) -> bool:
    # Libraries of attention kernels have namespaces of their own, by version and build: flash_attn, flash_attn_3,
    # _vllm_flash_attn3_1a2b3c4 (from the hub), torch_attn.
    namespace, found, _ = op.name().partition("::")
    return op.name() in ATTENTION or bool(found and ("attn" in namespace or "attention" in namespace))
