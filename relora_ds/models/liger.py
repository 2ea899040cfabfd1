"""liger-kernel's fused cross-entropy, norms, rotary embedding and SwiGLU, on CUDA devices.

Its kernels take the place of the modules' forward functions; names, parameters and wrapped linears stay. The loss comes
straight from the last hidden states: the logits, tokens x vocabulary, are never whole in memory while a model trains.

That loss reads the head's weight and does not call the head. At ZeRO stage 3 DeepSpeed gathers what is read so within
its engine's forward, and takes it for a parameter of the module that reads it from then on, in backward too.
"""

import torch
from torch import nn
from transformers import PreTrainedModel


def problems(model: PreTrainedModel) -> list[str]:
    """Return why this machine has no kernels for `model` (which may be on meta)."""
    remedy = "use model.use_liger_kernel=false"
    if not torch.cuda.is_available():
        reason = "needs a CUDA device, and there is none here"
    else:
        try:
            families = _families()
        except ImportError as error:
            reason, remedy = f"needs liger-kernel ({error})", f"pip install liger-kernel, or {remedy}"
        else:
            if model.config.model_type in families:
                return []
            reason = f"is not supported: liger-kernel has nothing for {model.config.model_type} models"
    return [f"model.use_liger_kernel: true {reason}; {remedy}"]


def apply(model: PreTrainedModel) -> PreTrainedModel:
    """Put liger-kernel's functions into `model`, wrapped or not, in place.

    They go into the classes of its family as well, so that all its models of this process have them from now on.

    Raises:
        ValueError: one of `problems`.
    """
    if found := problems(model):
        raise ValueError("\n".join(found))
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    # The fused loss multiplies by the head's weight itself: a low-rank update of the head would be left out.
    plain_head = type(model.get_output_embeddings()) is nn.Linear
    _apply_liger_kernel_to_instance(model, fused_linear_cross_entropy=plain_head)
    return model


def _families() -> set[str]:
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    return set(MODEL_TYPE_TO_APPLY_LIGER_FN)
