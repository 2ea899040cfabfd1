"""Batches of rows: training in a resumable global order, evaluation of every token once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from relora_ds.data.rows import Layout, PackedRows, Padding, evaluation_rows, training_rows


class TrainLoader:
    """Micro-batches of rows of `seq_len` tokens: non-overlapping windows, masked or not, or padded documents.

    The global order of the rows is one permutation per epoch, seeded by (seed, epoch): it does not depend on the world
    size or on `micro_batch_size`, so a run gives the same batches on any number of ranks. The state is the number of
    rows consumed by all ranks together; a batch may straddle two epochs. Of several islands each takes every n-th row
    of that order; the state counts the rows of all, so that a run can continue with another number of islands.

    tokens             1-D integer array, for instance `PreparedData.train`
    batch_sequences    rows per optimizer step, over all ranks and micro-batches
    rank, world_size   of the data-parallel group
    seed               a non-negative integer
    layout             `PreparedData.layout`; None = the rows are windows, whatever documents are in them
    island, islands    which one of how many this is

    Raises ValueError if `batch_sequences` is not a multiple of `micro_batch_size * world_size`, or if the corpus holds
    fewer rows than one batch.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        seq_len: int,
        batch_sequences: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        seed: int,
        layout: Layout = None,
        island: int = 0,
        islands: int = 1,
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        assert 0 <= island < islands, (island, islands)
        self.gradient_accumulation_steps = _accumulation_steps(batch_sequences, micro_batch_size, world_size)
        self.rows = training_rows(tokens, seq_len, layout)
        self.num_sequences = len(self.rows)
        if self.num_sequences < batch_sequences * islands:
            is_packed = not isinstance(layout, Padding)
            what = f"sequences of {seq_len} tokens" if is_packed else "documents (data.packing=false)"
            raise ValueError(
                f"train.batch_sequences: {batch_sequences}{_on_each(islands)} is more than the {self.num_sequences} "
                f"{what} in the corpus ({len(tokens)} tokens); lower it, "
                f"{'shorten data.seq_len' if is_packed else 'set data.packing=true'} or use a "
                f"larger corpus"
            )
        self.batch_sequences = batch_sequences
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.island, self.islands = island, islands
        self.consumed = 0  # sequences, over all islands, ranks and epochs
        self._order_epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def next_step(self) -> list[dict[str, torch.Tensor]]:
        """Yield this rank's micro-batches of one optimizer step: `gradient_accumulation_steps` of `rows.batch`.

        Those of padded or masked rows also hold `num_items_in_batch`, a 0-dim float tensor that Hugging Face models
        divide the sum of their losses by: the predicted tokens of the whole batch, per micro-batch. The mean over
        micro-batches and ranks is then the mean over tokens, for every world and micro-batch size; the models' own mean
        over a micro-batch would give the tokens of short documents more weight, by how they happen to be grouped.
        """
        size = self.batch_sequences * self.islands
        batch = self._sequences(self.consumed, self.consumed + size)[self.island :: self.islands]
        self.consumed += size
        # [accumulation, world, micro]: a micro-step takes neighbours in the global order.
        mine = batch.reshape(-1, self.world_size, self.micro_batch_size)[:, self.rank]
        micro_batches = [self.rows.batch(indices) for indices in mine]
        if not isinstance(self.rows, PackedRows):
            predicted = max(1, self.rows.num_predicted(batch))  # of documents of one token the loss is 0, and not 0/0
            share = predicted / (self.gradient_accumulation_steps * self.world_size)
            for micro_batch in micro_batches:
                micro_batch["num_items_in_batch"] = torch.tensor(share, dtype=torch.float32)
        return micro_batches

    def skip(self, steps: int) -> None:
        """Leave the rows of so many steps out."""
        self.consumed += steps * self.batch_sequences * self.islands

    def state_dict(self) -> dict[str, int]:
        """Return where the next step starts; the same on every rank, valid for any world and micro-batch size."""
        epoch, position = divmod(self.consumed, self.num_sequences)
        return {"epoch": epoch, "position": position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from `state`. Raises ValueError if it cannot belong to this corpus and sequence length."""
        epoch, position = state["epoch"], state["position"]
        if epoch < 0 or not 0 <= position < self.num_sequences:
            raise ValueError(
                f"data: the saved state {dict(state)} does not fit a corpus of {self.num_sequences} "
                f"sequences; resume with the data, data.seq_len and data.packing that the run started "
                f"with"
            )
        self.consumed = epoch * self.num_sequences + position

    def _sequences(self, start: int, stop: int) -> np.ndarray:
        """Row numbers at places [start, stop) of the endless global order."""
        parts = []
        while start < stop:
            epoch, position = divmod(start, self.num_sequences)
            count = min(stop - start, self.num_sequences - position)
            parts.append(self._permutation(epoch)[position : position + count])
            start += count
        return np.concatenate(parts)

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._order_epoch:
            self._order = np.random.default_rng([self.seed, epoch]).permutation(self.num_sequences)
            self._order_epoch = epoch
        return self._order


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
