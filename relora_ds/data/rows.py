"""Rows of a batch: windows of the packed tokens, or single documents that are padded.

Padding goes to the right and gets the label -100, so it needs no attention mask: under a causal mask a real token sees
only what is left of it, which is real, and what the model computes at the padding is in no loss. A mask would change no
figure and would keep the fast attention kernels from being used. (Positions count from the left, so they agree too.)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

IGNORED_LABEL = -100  # Hugging Face's and PyTorch's: positions with this label do not count in the loss
# Looking for the ends of documents makes an array of one byte a token; so much at a time.
TOKENS_AT_A_TIME = 1 << 26


class Padding(NamedTuple):
    """eos_id ends each document. pad_id fills the rows: the tokenizer's, or EOS where it has none."""

    eos_id: int
    pad_id: int


class PackedRows:
    """Row i is the tokens [i·seq_len, (i+1)·seq_len). Tokens beyond the last whole row are never seen."""

    def __init__(self, tokens: np.ndarray, seq_len: int) -> None:
        self._windows = tokens[: len(tokens) // seq_len * seq_len].reshape(-1, seq_len)

    def __len__(self) -> int:
        return len(self._windows)

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """int64 tensors `input_ids` and `labels`, [len(indices), seq_len], equal: Hugging Face models shift labels."""
        input_ids = torch.from_numpy(self._windows[indices].astype(np.int64))
        return {"input_ids": input_ids, "labels": input_ids.clone()}


class PaddedRows:
    """Row i is document i, its EOS included, cut or padded to seq_len.

    Documents of one token, in which nothing is predicted, are left out. Where documents end is read off the tokens: no
    text gives the EOS id, because special tokens are not read out of texts (`tokenizer.encode`).
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, padding: Padding) -> None:
        parts = [
            np.flatnonzero(tokens[start : start + TOKENS_AT_A_TIME] == padding.eos_id) + start + 1
            for start in range(0, len(tokens), TOKENS_AT_A_TIME)
        ]
        ends = np.unique(np.concatenate([*parts, [len(tokens)]]))  # the last document may have been cut by max_tokens
        starts = np.concatenate([[0], ends[:-1]])
        used = ends - starts >= 2
        self._tokens, self._seq_len, self._pad_id = tokens, seq_len, padding.pad_id
        self._starts, self._lengths = starts[used], np.minimum(ends - starts, seq_len)[used]

    def __len__(self) -> int:
        return len(self._starts)

    def batch(self, indices: np.ndarray) -> dict[str, torch.Tensor]:
        """int64 tensors `input_ids` and `labels`, [len(indices), seq_len]. An index of -1 gives a row of padding."""
        input_ids = np.full((len(indices), self._seq_len), self._pad_id, dtype=np.int64)
        labels = np.full((len(indices), self._seq_len), IGNORED_LABEL, dtype=np.int64)
        for row, index in enumerate(indices):
            if index >= 0:
                start, length = self._starts[index], self._lengths[index]
                input_ids[row, :length] = labels[row, :length] = self._tokens[start : start + length]
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}

    def num_predicted(self, indices: np.ndarray) -> int:
        """Tokens that are predicted in those rows: all but the first of each."""
        return int((self._lengths[indices] - 1).sum())
