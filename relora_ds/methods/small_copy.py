"""A small copy of a model: built, run, and checked to predict the next token."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from relora_ds.models.loading import from_config
from relora_ds.models.tiny import tiny_config

_BATCH, _LENGTH = 4, 32


class NotRunnableError(Exception):
    """The small copy cannot be built, or not run on text alone."""


class UnsupportedAttentionError(Exception):
    """The family has no such implementation of attention."""


def small_model(config: PretrainedConfig, attention: str) -> PreTrainedModel:
    """Return the small copy, fp32 on the CPU, every weight random: a weight of 0 would let no gradient through."""
    try:
        small = tiny_config(config)
        text = small.get_text_config(decoder=True)
        small.use_cache = text.use_cache = False
        if getattr(text, "pad_token_id", None) is None:
            text.pad_token_id = 0  # some families count positions from it; the run's is the tokenizer's
        torch.default_generator.manual_seed(0)
        model = from_config(small, dtype=torch.float32, attn_implementation=attention)
    except Exception as error:  # whatever the code of a family raises
        if attention != "eager" and "does not support an attention implementation" in str(error):
            raise UnsupportedAttentionError from error
        raise NotRunnableError(first_line(error)) from error
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model.eval()


def tokens(model: PreTrainedModel, seed: int) -> Tensor:
    vocab = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(min(5, vocab - 1), vocab, (_BATCH, _LENGTH), generator=torch.Generator().manual_seed(seed))


def run(model: nn.Module, ids: Tensor, **inputs: Any):
    """Return the output for `ids` and other inputs; labels are the ids themselves where there are none."""
    torch.default_generator.manual_seed(0)  # some families draw random numbers in evaluation too
    return model(input_ids=ids, **{"labels": ids, **inputs})


def distance(one: Tensor, other: Tensor) -> float:
    return ((one - other).norm() / one.norm()).item()


def language_model_problems(config: PretrainedConfig, output, ids: Tensor, ahead: float) -> list[str]:
    """Return why the plain model would not learn to predict the next token."""
    family = f"transformers' {config.model_type} models"
    remedy = "choose a decoder-only family such as LLaMA, Qwen or GPT-NeoX"
    if output.logits.shape[:2] != ids.shape:
        return [
            f"model.name_or_path: {family} give logits of shape {tuple(output.logits.shape)} for ids of shape "
            f"{tuple(ids.shape)}; {remedy}"
        ]
    if not ahead <= 1e-4:
        return [
            f"model.name_or_path: {family} let a token see those after it, so that they cannot be trained to "
            f"predict the next one; set is_decoder: true in their configuration if they have it, or {remedy}"
        ]
    if output.loss is None:
        return [f"model.name_or_path: {family} compute no loss from labels; {remedy}"]
    flat = output.logits.float()
    shifted = F.cross_entropy(flat[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).item()
    copied = F.cross_entropy(flat.flatten(0, 1), ids.flatten()).item()
    loss = output.loss.item()
    if abs(loss - copied) <= 1e-5 * abs(copied):
        kind = ", an encoder-decoder's decoder," if getattr(config, "is_encoder_decoder", False) else ""
        return [
            f"model.name_or_path: {family}{kind} do not shift the labels: their loss is that of repeating each "
            f"token, not of predicting the next one; {remedy}"
        ]
    if abs(loss - shifted) > 1e-4 * abs(shifted) and getattr(output, "aux_loss", None) is None:
        return [
            f"model.name_or_path: {family} return a loss of {loss:.4f} where the cross-entropy of the next token "
            f"is {shifted:.4f}: training and validation loss would not be comparable; {remedy}"
        ]
    return []


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
