"""The public `wrap`: low-rank updates for a model, tried on a small copy of it first where there is one."""

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedModel

from relora_ds.config import ReLoRAConfig
from relora_ds.lowrank import wrap as lowrank
from relora_ds.lowrank.words import in_python
from relora_ds.methods.proof import prove
from relora_ds.zero.init_context import whole_models


def wrap(model: nn.Module, config: ReLoRAConfig, *, seed: int = 0, base: bool = True) -> nn.Module:
    """Replace the target linears by `ReLoRALinear`, in place, and freeze what does not train.

    A causal language model of transformers is tried on a small copy first, in about a second: the same function after
    wrapping, a gradient for every B, merged as live. How a loss is computed is left to the caller's loop.

    The model then carries its config, as PEFT's do: `model.relora_config` and `model.print_trainable_parameters()`.

    Args:
        model: a model on CPU or meta, or partitioned by ZeRO-3, in the precision that its masters shall have (fp32).
        config: which linears, rank and scaling; see `ReLoRAConfig`.
        seed: with the module names, decides the values of `lora_A`.
        base: False drops the frozen weights: `y = s·B·A·x`, the paper's LoRA baseline.

    Returns:
        The same model. Its `config.tie_word_embeddings` agrees with its parameters.

    Raises:
        ValueError: every problem at once: those of `lowrank.wrap.wrap`, and linears that would not train or whose
            update would be lost; the message names what leaves them out.
    """
    found = lowrank.problems(model, config, base=base)
    if not found and isinstance(model, PreTrainedModel) and _has_small_copy(model):
        with whole_models():
            found = prove(model.config, config, base=base, attention="eager", next_token=False).problems
    if found:
        raise ValueError("\n".join(in_python(message) for message in found))
    return lowrank.wrap(model, config, seed=seed, base=base)


def _has_small_copy(model: PreTrainedModel) -> bool:
    """Return True if the model is what its configuration alone would give."""
    return type(model) is MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
