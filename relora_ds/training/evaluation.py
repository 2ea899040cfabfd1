"""Validation loss, exact: every token but the first is predicted once, sums are fp64, one division at the end.

So the figure is the same for every world size and micro-batch, and comparable between runs.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.nn import functional as F

from relora_ds.data import PreparedData, evaluation_batches


@dataclass(frozen=True)
class Evaluation:
    """Attributes: as in `metrics.jsonl`; `val_loss` is nats per token, `word_ppl` per whitespace-separated word.

    galore_loss is what the evaluation in GaLore's published code, which later work took over, would print for the same
    network: the batches' mean losses, added up and divided by one more than there are batches. It is there where rows
    are padded documents (data.packing=false), as theirs are, and changes with micro-batch and ranks: good for a
    comparison with printed tables, and for nothing else.
    """

    val_loss: float
    val_tokens: int
    ppl: float
    word_ppl: float
    bits_per_byte: float
    galore_loss: float | None = None

    def figures(self) -> dict[str, float]:
        """Those that there are, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@torch.no_grad()
def evaluate(model, data: PreparedData, *, seq_len: int, micro_batch_size: int, device: torch.device,
             max_tokens: int | None = None) -> Evaluation:
    """Evaluate on the validation split. Collective; leaves the model in the mode it was in.

    Args:
        model: a callable engine or module that returns an object with `logits`, with train() and eval().
        max_tokens: of the split, about so many, spread over it; None takes all.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    training = model.training
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # nats, tokens
    means = torch.zeros(2, dtype=torch.float64, device=device)  # of the batches' means, batches
    for batch in evaluation_batches(data.validation, seq_len, micro_batch_size, rank, world_size, data.padding,
                                    max_tokens):
        logits = model(input_ids=batch["input_ids"].to(device)).logits
        labels = batch["labels"][:, 1:].to(device)
        losses = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction="none",
                                 ignore_index=-100)
        batch_sums = torch.stack([losses.sum(dtype=torch.float64), (labels != -100).sum()])
        sums += batch_sums
        if batch_sums[1] > 0:
            means += torch.stack([batch_sums[0] / batch_sums[1], torch.ones_like(batch_sums[1])])
    model.train(training)
    off_by_one = means[:1] / (means[1:] + 1)
    if dist.is_initialized():
        dist.all_reduce(sums)
        dist.all_reduce(off_by_one)
    nats, tokens = sums[0].item(), int(sums[1].item())
    # Words and bytes are counted over the whole split: tokens not predicted have the average token's share of nats.
    whole = nats * len(data.validation) / tokens
    return Evaluation(val_loss=nats / tokens, val_tokens=tokens, ppl=_exp(nats / tokens),
                      word_ppl=_exp(whole / data.validation_words),
                      bits_per_byte=whole / math.log(2) / data.validation_bytes,
                      galore_loss=None if data.padding is None else off_by_one.item() / world_size)


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
