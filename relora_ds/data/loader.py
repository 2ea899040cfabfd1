"""Batches of token windows: training in a resumable global order, evaluation of every token once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

IGNORED_LABEL = -100  # Hugging Face's and PyTorch's: positions with this label do not count in the loss


class TrainLoader:
    """Micro-batches of non-overlapping windows of `seq_len` tokens.

    The global order of the sequences is one permutation per epoch, seeded by (seed, epoch): it does not
    depend on the world size or on `micro_batch_size`, so a run gives the same batches on any number of
    ranks. The state is the number of sequences consumed by all ranks together; a batch may straddle two
    epochs. Tokens beyond the last whole window are never seen.

    tokens             1-D integer array, for instance `PreparedData.train`
    batch_sequences    sequences per optimizer step, over all ranks and micro-batches
    rank, world_size   of the data-parallel group
    seed               a non-negative integer

    Raises ValueError if `batch_sequences` is not a multiple of `micro_batch_size * world_size`, or if the
    corpus holds fewer sequences than one batch.
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
    ) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        self.gradient_accumulation_steps = _accumulation_steps(batch_sequences, micro_batch_size, world_size)
        self.num_sequences = len(tokens) // seq_len
        if self.num_sequences < batch_sequences:
            raise ValueError(
                f"train.batch_sequences: {batch_sequences} is more than the {self.num_sequences} sequences "
                f"of {seq_len} tokens in the corpus ({len(tokens)} tokens); lower it, shorten data.seq_len "
                f"or use a larger corpus"
            )
        self.windows = tokens[: self.num_sequences * seq_len].reshape(self.num_sequences, seq_len)
        self.batch_sequences = batch_sequences
        self.micro_batch_size = micro_batch_size
        self.rank = rank
        self.world_size = world_size
        self.seed = seed
        self.consumed = 0  # sequences, over all ranks and epochs
        self._order_epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def next_step(self) -> list[dict[str, torch.Tensor]]:
        """This rank's micro-batches of one optimizer step.

        `gradient_accumulation_steps` dicts of int64 tensors `input_ids` and `labels`, [micro_batch_size,
        seq_len]. The labels are the input ids: Hugging Face models shift them.
        """
        batch = self._sequences(self.consumed, self.consumed + self.batch_sequences)
        self.consumed += self.batch_sequences
        # [accumulation, world, micro]: a micro-step takes neighbours in the global order.
        mine = batch.reshape(-1, self.world_size, self.micro_batch_size)[:, self.rank]
        return [_batch(self.windows[indices]) for indices in mine]

    def state_dict(self) -> dict[str, int]:
        """Where the next step starts; the same on every rank, valid for any world and micro-batch size."""
        epoch, position = divmod(self.consumed, self.num_sequences)
        return {"epoch": epoch, "position": position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue from `state`. Raises ValueError if it cannot belong to this corpus and sequence length."""
        epoch, position = state["epoch"], state["position"]
        if epoch < 0 or not 0 <= position < self.num_sequences:
            raise ValueError(
                f"data: the saved state {dict(state)} does not fit a corpus of {self.num_sequences} "
                f"sequences; resume with the data and data.seq_len that the run started with"
            )
        self.consumed = epoch * self.num_sequences + position

    def _sequences(self, start: int, stop: int) -> np.ndarray:
        """Window numbers at places [start, stop) of the endless global order."""
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
    tokens: np.ndarray, seq_len: int, micro_batch_size: int, rank: int, world_size: int
) -> Iterator[dict[str, torch.Tensor]]:
    """This rank's part of one pass in which every token but the first is predicted exactly once.

    Windows of `seq_len` tokens start every `seq_len - 1` tokens: a model that shifts the labels (Hugging
    Face's do) predicts all but the first token of a window, and that one was the last of the window before.
    Yields dicts of int64 tensors `input_ids` and `labels`, [micro_batch_size, seq_len]; the end is padded
    with id 0 and label -100.

    Every rank yields the same number of batches, so that collectives in the forward match (ZeRO-3). Some may
    hold padding only, for which a mean loss is 0/0: add up losses and divide once by the sum over ranks of
    `(labels[:, 1:] != -100).sum()`, which is `len(tokens) - 1`.
    """
    assert 0 <= rank < world_size, (rank, world_size)
    if seq_len < 2 or len(tokens) < 2:
        raise ValueError(
            f"data.validation: {len(tokens)} tokens in windows of data.seq_len {seq_len} leave nothing to "
            f"predict; both must be at least 2"
        )
    stride = seq_len - 1
    num_windows = -(-(len(tokens) - 1) // stride)
    for first in range(0, num_windows, micro_batch_size * world_size):
        input_ids = np.zeros((micro_batch_size, seq_len), dtype=np.int64)
        labels = np.full((micro_batch_size, seq_len), IGNORED_LABEL, dtype=np.int64)
        for row in range(micro_batch_size):
            start = (first + rank * micro_batch_size + row) * stride
            window = tokens[start : start + seq_len]
            if start < num_windows * stride:
                input_ids[row, : len(window)] = window
                labels[row, : len(window)] = window
        yield {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}


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


def _batch(windows: np.ndarray) -> dict[str, torch.Tensor]:
    input_ids = torch.from_numpy(windows.astype(np.int64))
    return {"input_ids": input_ids, "labels": input_ids.clone()}
