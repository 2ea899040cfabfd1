"""Keep the documents of a row apart (`data.packing: masked`): a small copy shows whether a model does.

Nothing in a configuration tells. Most families make a mask, or hand the bounds of documents to their kernels, where the
positions in a row begin again. Others compute positions of their own, carry a state from token to token, or drop what
they are given. In rows of several documents each must give the logits that it gives alone.
"""

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.masking_utils import flash_attention_mask

from relora_ds.methods.small_copy import distance, first_line, run, small_model, tokens
from relora_ds.methods.trial import SAME
from relora_ds.models.attention import WITH_MASK, document_bounds

BY_BOUNDS = "by_bounds"  # no "flash" in the name: transformers would look for a package
_BEGINS = ((0, 13), (0, 1, 20), (0,), (0, 9, 10, 27))  # of the documents in each row
_IGNORED_LABEL = -100
_NUM_ITEMS = 10.0


def problems(model: PreTrainedModel, config: PretrainedConfig, attention: str) -> list[str]:
    """Return why documents would not be as if each were alone.

    Args:
        model: the small copy of what `config` describes, with sdpa or eager attention.
        attention: the recipe's `model.attn_implementation`.
    """
    try:
        if attention not in WITH_MASK:
            AttentionInterface.register(BY_BOUNDS, _by_bounds)
            AttentionMaskInterface.register(BY_BOUNDS, flash_attention_mask)
            model = small_model(config, BY_BOUNDS)
        reason = _reason(model, attention)
    except Exception as error:  # whatever the code of a family raises
        reason = f"cannot be told where documents begin ({first_line(error)})"
    if reason is None:
        return []
    others = "" if attention in WITH_MASK else f" with model.attn_implementation {attention}"
    return [
        f"data.packing: masked does not fit transformers' {config.model_type} models{others}, which {reason}; use "
        f"{'another model.attn_implementation, ' if others else ''}data.packing=true or data.packing=false"
    ]


@torch.no_grad()
def _reason(model: PreTrainedModel, attention: str) -> str | None:
    """Return what the model does with several documents in a row that it should not do, or None."""
    ids = tokens(model, 0)
    position_ids = torch.zeros_like(ids)
    for row, places in enumerate(_BEGINS):
        for start, stop in itertools.pairwise((*places, ids.shape[1])):
            position_ids[row, start:stop] = torch.arange(stop - start)
    begins = position_ids == 0
    labels = ids.masked_fill(begins, _IGNORED_LABEL)
    inputs: dict[str, Any] = {"labels": labels, "position_ids": position_ids, "num_items_in_batch": _NUM_ITEMS}
    together = run(model, ids, **inputs, **document_bounds(attention, position_ids))
    logits, document = together.logits.flatten(0, 1), begins.flatten().cumsum(0) - 1
    alone = run(model, _one_a_row(ids, begins)).logits[document, position_ids.flatten()]
    if not distance(alone, logits) <= SAME:
        return "let a document see another one in its row, or count its positions from there"
    next_labels = F.pad(labels[:, 1:], (0, 1), value=_IGNORED_LABEL)
    nats = F.cross_entropy(logits.float(), next_labels.flatten(), reduction="sum").item()
    if abs(together.loss * _NUM_ITEMS - nats) > 1e-4 * nats and getattr(together, "aux_loss", None) is None:
        return "do not divide the loss by the number of tokens that they are given"
    return None


def _one_a_row(ids: Tensor, begins: Tensor) -> Tensor:
    """Return each document at the beginning of a row of its own, followed by zeros."""
    bounds = [*begins.flatten().nonzero().flatten().tolist(), ids.numel()]
    rows = ids.new_zeros(len(bounds) - 1, ids.shape[1])
    for row, (start, stop) in enumerate(itertools.pairwise(bounds)):
        rows[row, : stop - start] = ids.flatten()[start:stop]
    return rows


def _by_bounds(
    module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Attend as flash-attention's kernels do: causally, without a mask, and only where the bounds of documents allow.

    query, key, value: `[rows, heads, length, head_dim]`; the result has heads behind length.
    """
    rows, heads, length, _ = query.shape
    document = torch.zeros(rows * length)
    if cu_seq_lens_q is not None:
        document[cu_seq_lens_q[:-1].long()] = 1
    document = document.cumsum(0).view(rows, 1, length)
    distances = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distances >= 0) & (distances < (sliding_window or length)) & (document[..., None] == document[..., None, :])
    key, value = (each.repeat_interleave(heads // each.shape[1], dim=1) for each in (key, value))
    attended = F.scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=scaling)
    return attended.transpose(1, 2).contiguous(), None
