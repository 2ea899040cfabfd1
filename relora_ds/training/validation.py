"""Validation loss, exact: every token but the first is predicted once, sums are fp64, one division at the end.

In masked or padded rows it is every token but the first of each document. So the figure is the same for every world
size and micro-batch, and comparable between runs.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from relora_ds.data import PreparedData, evaluation_batches
from relora_ds.data.rows import IGNORED_LABEL
from relora_ds.training.inputs import inputs_of

LOGITS_AT_ONCE = 1 << 24  # of which losses are computed in fp32: 64 MiB, and their softmax


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
        """Return the figures that are known, by name."""
        return {name: value for name, value in vars(self).items() if value is not None}


@torch.no_grad()
def evaluate(
    model,
    data: PreparedData,
    *,
    seq_len: int,
    micro_batch_size: int,
    device: torch.device,
    max_tokens: int | None = None,
) -> Evaluation:
    """Evaluate on the validation split. Collective; leaves the model in the mode it was in.

    Args:
        model: a callable engine or module that returns an object with `logits`, with train() and eval().
        max_tokens: of the split, about so many, spread over it; None takes all.
    """
    sums = torch.zeros(2, dtype=torch.float64, device=device)  # nats, tokens
    means = torch.zeros(2, dtype=torch.float64, device=device)  # of the batches' means, batches
    with _in_evaluation(model):
        for batch in _batches(data, seq_len, micro_batch_size, max_tokens):
            nats, tokens = batch_sums = _nats_and_tokens(model, batch, device)
            sums += batch_sums
            means += torch.stack([nats / tokens.clamp(min=1), tokens.clamp(max=1)])  # 0 of a batch of padding
    off_by_one = means[:1] / (means[1:] + 1)
    world_size = 1
    if dist.is_initialized():
        world_size = dist.get_world_size()
        dist.all_reduce(sums)
        dist.all_reduce(off_by_one)
    nats, tokens = sums[0].item(), int(sums[1].item())
    # Words and bytes are counted over the whole split: tokens not predicted have the average token's share of nats.
    whole = nats * len(data.validation) / tokens
    return Evaluation(
        val_loss=nats / tokens,
        val_tokens=tokens,
        ppl=_exp(nats / tokens),
        word_ppl=_exp(whole / data.validation_words),
        bits_per_byte=whole / math.log(2) / data.validation_bytes,
        galore_loss=None if data.padding is None else off_by_one.item() / world_size,
    )


@torch.no_grad()
def rehearse(model, data: PreparedData, *, seq_len: int, micro_batch_size: int, device: torch.device) -> None:
    """Evaluate one batch and forget it: one that does not fit fails now, and not hours into a run. Collective.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    with _in_evaluation(model):
        batch = next(_batches(data, seq_len, micro_batch_size))
        try:
            _nats_and_tokens(model, batch, device).tolist()
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"train.micro_batch_size: {micro_batch_size} sequences of {seq_len} tokens "
                f"are too many to evaluate; lower it ({error})"
            ) from error


@contextmanager
def _in_evaluation(model) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _batches(
    data: PreparedData, seq_len: int, micro_batch_size: int, max_tokens: int | None = None
) -> Iterator[dict[str, Tensor]]:
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return evaluation_batches(data.validation, seq_len, micro_batch_size, rank, world_size, data.layout, max_tokens)


def _nats_and_tokens(model, batch: dict[str, Tensor], device: torch.device) -> Tensor:
    """`[2]` fp64: the sum of the losses of a batch's predicted tokens, and how many they are."""
    inputs = inputs_of(batch, model, device)
    labels = inputs.pop("labels")
    if takes := _fused_loss(model):
        nats = model(**inputs, labels=labels, **takes).loss
    else:
        nats = _losses(model(**inputs).logits, labels).sum(dtype=torch.float64)
    return torch.stack([nats.double(), (labels[:, 1:] != IGNORED_LABEL).sum()])


def _losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Every token's loss given those before it, `[rows * (length - 1)]` fp32; 0 where it is not to be predicted.

    In fp32 are only so many logits at a time. Each loss depends on its own logits alone, so its bits do not change.
    """
    num_rows, length, vocab_size = logits.shape
    next_labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL).flatten()
    at_once = max(1, LOGITS_AT_ONCE // vocab_size)
    losses = [
        F.cross_entropy(some.float(), wanted, reduction="none", ignore_index=IGNORED_LABEL)
        for some, wanted in zip(logits.flatten(0, 1).split(at_once), next_labels.split(at_once), strict=True)
    ]
    return torch.cat(losses).view(num_rows, length)[:, :-1].flatten()


def _fused_loss(model) -> dict:
    """Return arguments with which liger-kernel's forward returns the sum of the losses, without logits; else {}."""
    takes = inspect.signature(getattr(model, "module", model).forward).parameters
    if "skip_logits" not in takes:
        return {}
    # The sum is divided by num_items_in_batch; a router's own loss would be added to it.
    without_router = {"output_router_logits": False} if "output_router_logits" in takes else {}
    return {"skip_logits": True, "num_items_in_batch": 1, **without_router}


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
