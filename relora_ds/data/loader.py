"""Batches of rows: training in a resumable global order, evaluation of every token once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from relora_ds.data.order import MixedOrder, ShuffledOrder
from relora_ds.data.rows import Layout, MixedRows, Padding, evaluation_rows, training_rows


class TrainLoader:
    """Micro-batches of rows of `seq_len` tokens: non-overlapping windows, masked or not, or padded documents.

    The global order of the rows (see `order`) does not depend on the world size or on `micro_batch_size`, so a run
    gives the same batches on any number of ranks. The state is how many rows all ranks have taken together; a batch may
    straddle two epochs. Of several islands each takes every n-th row of that order, of a mixture every n-th of a step's
    rows in a random order; the state counts the rows of all, so that a run can continue with another number of islands.

    tokens             1-D integer array, or with `weights` one for each corpus of a mixture
    batch_sequences    rows per optimizer step, over all ranks and micro-batches
    rank, world_size   of the data-parallel group
    seed               a non-negative integer
    layout             `PreparedData.layout`; None = the rows are windows, whatever documents are in them
    island, islands    which one of how many this is
    weights            of a mixture: the share of the rows that each corpus has; None = there is one corpus

    Raises ValueError if `batch_sequences` is not a multiple of `micro_batch_size * world_size`, if there are fewer rows
    than one batch, or if a corpus of a mixture holds none.
    """

    def __init__(
        self,
        tokens: np.ndarray | Sequence[np.ndarray],
        seq_len: int,
        batch_sequences: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        layout: Layout = None,
        island: int = 0,
        islands: int = 1,
        weights: Sequence[float] | None = None,
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        assert 0 <= island < islands, (island, islands)
        self.gradient_accumulation_steps = _accumulation_steps(batch_sequences, micro_batch_size, world_size)
        corpora = [tokens] if isinstance(tokens, np.ndarray) else list(tokens)
        rows = [training_rows(each, seq_len, layout) for each in corpora]
        self.num_sequences = [len(each) for each in rows]  # of each corpus
        is_packed = not isinstance(layout, Padding)
        what = f"sequences of {seq_len} tokens" if is_packed else "documents (data.packing=false)"
        remedy = "shorten data.seq_len" if is_packed else "set data.packing=true"
        if sum(self.num_sequences) < batch_sequences * islands:
            raise ValueError(
                f"train.batch_sequences: {batch_sequences}{_on_each(islands)} is more than the "
                f"{sum(self.num_sequences)} {what} in the corpus ({sum(map(len, corpora))} tokens); lower it, {remedy} "
                "or use a larger corpus"
            )
        if 0 in self.num_sequences:
            index = self.num_sequences.index(0)
            raise ValueError(
                f"data.mix[{index}]: its {len(corpora[index])} tokens hold none of the {what}; {remedy} or remove it"
            )
        self.rows = rows[0] if weights is None else MixedRows(rows)
        self.order = (
            ShuffledOrder(self.num_sequences[0], seed)
            if weights is None
            else MixedOrder(self.num_sequences, weights, seed)
        )
        self._counts_tokens, self._seed = layout is not None, seed
        self.batch_sequences = batch_sequences
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.island, self.islands = island, islands

    def next_step(self) -> list[dict[str, torch.Tensor]]:
        """Yield this rank's micro-batches of one optimizer step: `gradient_accumulation_steps` of `rows.batch`.

        Those of padded or masked rows also hold `num_items_in_batch`, a 0-dim float tensor that Hugging Face models
        divide the sum of their losses by: the predicted tokens of the whole batch, per micro-batch. The mean over
        micro-batches and ranks is then the mean over tokens, for every world and micro-batch size; the models' own mean
        over a micro-batch would give the tokens of short documents more weight, by how they happen to be grouped.
        """
        batch = self._rows_of_islands()[self.island :: self.islands]
        # [accumulation, world, micro]: a micro-step takes neighbours in the global order.
        mine = batch.reshape(-1, self.world_size, self.micro_batch_size)[:, self.rank]
        micro_batches = [self.rows.batch(indices) for indices in mine]
        if self._counts_tokens:
            predicted = max(1, self.rows.num_predicted(batch))  # of documents of one token the loss is 0, and not 0/0
            share = predicted / (self.gradient_accumulation_steps * self.world_size)
            for micro_batch in micro_batches:
                micro_batch["num_items_in_batch"] = torch.tensor(share, dtype=torch.float32)
        return micro_batches

    def _rows_of_islands(self) -> np.ndarray:
        """Return the rows that all islands take in one step; of n islands each takes every n-th."""
        before, rows = self.order.taken, self.order.take(self.batch_sequences * self.islands)
        if self.islands == 1 or isinstance(self.order, ShuffledOrder):
            return rows
        # Corpora take turns in a fixed rhythm: every n-th row could be of the same ones for the whole run.
        return np.random.default_rng([self._seed, before]).permutation(rows)

    def skip(self, steps: int) -> None:
        """Leave the rows of so many steps out."""
        self.order.skip(steps * self.batch_sequences * self.islands)

    def state_dict(self) -> dict[str, Any]:
        """Return where the next step starts; the same on every rank, valid for any world and micro-batch size."""
        return self.order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`. Raises ValueError if it cannot belong to this corpus and sequence length."""
        try:
            self.order.load_state_dict(state)
        except ValueError as error:
            raise ValueError(
                f"data: the saved state {error}; resume with the data, data.seq_len and data.packing that the run "
                "started with"
            ) from None


def evaluation_batches(
    tokens: np.ndarray,
    seq_len: int,
    micro_batch_size: int,
    rank: int,
    world_size: int,
    layout: Layout = None,
    max_tokens: int | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield this rank's part of one pass over the validation tokens, or over about `max_tokens` of them.

    Windows (layout None): every token but the first is predicted exactly once. They start every `seq_len - 1`
    tokens: a model that shifts the labels (Hugging Face's do) predicts all but the first token of a window, and that
    one was the last of the window before. Masked: the same windows, without the first token of each document. Padded:
    each document once, cut to `seq_len`; all but the first of its tokens are predicted. With `max_tokens`, every n-th
    row: neighbours are of the same few documents.

    Yields dicts of int64 tensors `input_ids` and `labels`, [micro_batch_size, seq_len], with masks `position_ids` too;
    padding and the end are filled with label -100.

    Every rank yields the same number of batches, so that collectives in the forward match (ZeRO-3). Some may hold
    padding only, for which a mean loss is 0/0: add up losses and divide once by the sum over ranks of
    `(labels[:, 1:] != -100).sum()`.
    """
    assert 0 <= rank < world_size, (rank, world_size)
    rows = evaluation_rows(tokens, seq_len, layout)
    every = 1 if max_tokens is None else -(-len(tokens) // max_tokens)
    num_rows = -(-len(rows) // every)
    for first in range(rank * micro_batch_size, rank * micro_batch_size + num_rows, micro_batch_size * world_size):
        indices = np.arange(first, first + micro_batch_size)
        yield rows.batch(np.where(indices < num_rows, indices * every, -1))


def _on_each(islands: int) -> str:
    return "" if islands == 1 else f" on each of {islands} islands"


def _accumulation_steps(batch_sequences: int, micro_batch_size: int, world_size: int) -> int:
    per_micro_step = micro_batch_size * world_size
    steps, remainder = divmod(batch_sequences, per_micro_step)
    if remainder or steps == 0:
        sizes = " or ".join(str(size * per_micro_step) for size in (steps, steps + 1) if size > 0)
        raise ValueError(
            f"train.batch_sequences: {batch_sequences} is not a multiple of {per_micro_step} "
            f"(micro_batch_size {micro_batch_size} x {world_size} ranks); use {sizes}, or change "
            f"train.micro_batch_size"
        )
    return steps
