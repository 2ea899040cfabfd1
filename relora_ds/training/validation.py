"""Validation loss, exact: every token but the first is predicted once, sums are fp64, one division at the end.

In masked or padded rows it is every token but the first of each document. So the figure is the same for every world
size and micro-batch, and comparable between runs.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from relora_ds.data import PreparedData, evaluation_batches
from relora_ds.data.rows import IGNORED_LABEL
from relora_ds.training.inputs import inputs_of

SET_PREFIX = "val_loss/"  # of the figures of named sets
LOGITS_AT_ONCE = 1 << 24  # of which losses are computed in fp32: 64 MiB, and their softmax


@dataclass(frozen=True)
class Evaluation:
    """Attributes: as in `metrics.jsonl`; `val_loss` is nats per token, `word_ppl` per whitespace-separated word.

    galore_loss is what the evaluation in GaLore's published code, which later work took over, would print for the same
    network: the batches' mean losses, added up and divided by one more than there are batches. It is there where rows
    are padded documents (data.packing=false), as theirs are, and changes with micro-batch and ranks: good for a
    comparison with printed tables, and for nothing else.

    sets: the loss, in nats per token, of each corpus of a mixture and of each of `data.validation_sets`.
    """

    val_loss: float
    val_tokens: int
    ppl: float
    word_ppl: float
    bits_per_byte: float
    galore_loss: float | None = None
    sets: dict[str, float] = field(default_factory=dict)

    def figures(self) -> dict[str, float]:
        """Return the figures that are known, by name."""
        own = {name: value for name, value in vars(self).items() if value is not None and name != "sets"}
        return own | {f"{SET_PREFIX}{name}": loss for name, loss in self.sets.items()}

    @classmethod
    def of(cls, line: dict[str, Any]) -> "Evaluation":
        """Return what a line of `metrics.jsonl` says; NaN for null. TypeError where a figure is missing or is none."""
        known: dict[str, Any] = {
            name: _number(line[name]) for name in cls.__dataclass_fields__ if name in line and name != "sets"
        }
        sets = {
            name.removeprefix(SET_PREFIX): _number(value) for name, value in line.items() if name.startswith(SET_PREFIX)
        }
        return cls(**known, sets=sets)


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
        max_tokens: of the split, about so many, spread over it, and of each of `data.sets`; None takes all.
    """
    texts = _texts(data, max_tokens)
    sums = torch.zeros(len(texts), 2, dtype=torch.float64, device=device)  # nats, tokens
    means = torch.zeros(2, dtype=torch.float64, device=device)  # of the batches' means, batches
    with in_evaluation(model):
        for text, text_sums in zip(texts, sums, strict=True):
            for batch in _batches(data, text.tokens, seq_len, micro_batch_size, text.max_tokens):
                nats, tokens = batch_sums = _nats_and_tokens(model, batch, device)
                text_sums += batch_sums
                if text.is_of_the_split:
                    means += torch.stack([nats / tokens.clamp(min=1), tokens.clamp(max=1)])  # 0 of a batch of padding
    off_by_one = means[:1] / (means[1:] + 1)
    world_size = 1
    if dist.is_initialized():
        world_size = dist.get_world_size()
        dist.all_reduce(sums)
        dist.all_reduce(off_by_one)
    of_the_split = sums[[text.is_of_the_split for text in texts]].sum(0)
    nats, tokens = of_the_split[0].item(), int(of_the_split[1].item())
    # Words and bytes are counted over the whole split: tokens not predicted have the average token's share of nats.
    whole = nats * len(data.validation) / tokens
    return Evaluation(
        val_loss=nats / tokens,
        val_tokens=tokens,
        ppl=_exp(nats / tokens),
        word_ppl=_exp(whole / data.validation_words),
        bits_per_byte=whole / math.log(2) / data.validation_bytes,
        galore_loss=None if data.padding is None else off_by_one.item() / world_size,
        sets={
            text.name: (text_sums[0] / text_sums[1]).item()
            for text, text_sums in zip(texts, sums, strict=True)
            if text.name is not None
        },
    )


@torch.no_grad()
def rehearse(model, data: PreparedData, *, seq_len: int, micro_batch_size: int, device: torch.device) -> None:
    """Evaluate one batch and forget it: one that does not fit fails now, and not hours into a run. Collective.

    Raises:
        torch.OutOfMemoryError: it does not fit.
    """
    with in_evaluation(model):
        batch = next(_batches(data, _texts(data)[0].tokens, seq_len, micro_batch_size))
        try:
            _nats_and_tokens(model, batch, device).tolist()
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"train.micro_batch_size: {micro_batch_size} sequences of {seq_len} tokens "
                f"are too many to evaluate; lower it ({error})"
            ) from error


@contextmanager
def in_evaluation(model) -> Iterator[None]:
    """Have a model in evaluation mode, and leave it in the mode it was in."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


class _Text(NamedTuple):
    """What is evaluated: the validation split, or a corpus of it, or another set."""

    name: str | None
    tokens: np.ndarray
    max_tokens: int | None
    is_of_the_split: bool


def _texts(data: PreparedData, max_tokens: int | None = None) -> list[_Text]:
    found = []
    for name, tokens in data.validation_parts():
        share = max_tokens and max(2, round(max_tokens * len(tokens) / len(data.validation)))
        found.append(_Text(name, tokens, share, True))
    return found + [_Text(one.name, one.tokens, max_tokens, False) for one in data.sets]


def _number(value: Any) -> float:
    return math.nan if value is None else value + 0


def _batches(
    data: PreparedData, tokens: np.ndarray, seq_len: int, micro_batch_size: int, max_tokens: int | None = None
) -> Iterator[dict[str, Tensor]]:
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    return evaluation_batches(tokens, seq_len, micro_batch_size, rank, world_size, data.layout, max_tokens)


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
