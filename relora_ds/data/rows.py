"""Rows of a batch: windows of the packed tokens, whose documents may be kept apart, or single documents, padded.

Padding goes to the right and gets the label -100, so it needs no attention mask: under a causal mask a real token sees
only what is left of it, which is real, and what the model computes at the padding is in no loss. A mask would change no
figure and would keep the fast attention kernels from being used. (Positions count from the left, so they agree too.)

Where documents end is read off the tokens: no text gives the EOS id, because special tokens are not read out of texts
(`tokenizer.encode`). An EOS belongs to the document that it ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from relora_ds.config import DataConfig

IGNORED_LABEL = -100  # Hugging Face's and PyTorch's: positions with this label do not count in the loss
# Looking for the ends of documents makes an array of one byte a token; so much at a time.
TOKENS_AT_A_TIME = 1 << 26


class Padding(NamedTuple):
    """A row is a document. eos_id ends each document. pad_id fills the rows: the tokenizer's, or EOS without one."""

    eos_id: int
    pad_id: int


class Masking(NamedTuple):
    """A row is a window, in which attention and positions stop at the ends of documents. eos_id ends each."""

    eos_id: int


# What a row has to do with documents; None: it is a window, whatever documents are in it.
Layout: TypeAlias = Padding | Masking | None


def layout_of(data: DataConfig, eos_id: int, pad_id: int) -> Layout:
    """Return what the rows of a `data.` section have to do with documents."""
    if not data.packing:
        return Padding(eos_id, pad_id)
    return Masking(eos_id) if data.masks_documents else None


class PackedRows:
    """Row i is the tokens [i·seq_len, (i+1)·seq_len). Tokens beyond the last whole row are never seen."""

    def __init__(self, tokens: np.ndarray, seq_len: int) -> None:
        self._windows = tokens[: len(tokens) // seq_len * seq_len].reshape(-1, seq_len)

    def __len__(self) -> int:
        return len(self._windows)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """int64 tensors `input_ids` and `labels`, [len(indices), seq_len], equal: Hugging Face models shift labels."""
        input_ids = torch.from_numpy(self._windows[indices].astype(np.int64))
        return {"input_ids": input_ids, "labels": input_ids.clone()}

    def num_predicted(self, indices: np.ndarray) -> int:
        """Tokens that are predicted in those rows: all but the first of each."""
        return len(indices) * (self._windows.shape[1] - 1)


class SlicedRows:
    """Row i is `lengths[i]` tokens from `starts[i]` on, followed by `fill` up to seq_len."""

    def __init__(
        self, tokens: np.ndarray, seq_len: int, starts: np.ndarray, lengths: np.ndarray, fill: int = 0
    ) -> None:
        self._tokens, self._seq_len, self._fill = tokens, seq_len, fill
        self._starts, self._lengths = starts, np.minimum(lengths, seq_len)

    def __len__(self) -> int:
        return len(self._starts)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """int64 tensors `input_ids` and `labels`, [len(indices), seq_len]. An index of -1 gives a row of `fill`."""
        input_ids = np.full((len(indices), self._seq_len), self._fill, dtype=np.int64)
        labels = np.full((len(indices), self._seq_len), IGNORED_LABEL, dtype=np.int64)
        for row, index in enumerate(indices):
            if index >= 0:
                start, length = self._starts[index], self._lengths[index]
                input_ids[row, :length] = labels[row, :length] = self._tokens[start : start + length]
        return {"input_ids": torch.from_numpy(input_ids), "labels": torch.from_numpy(labels)}

    def num_predicted(self, indices: np.ndarray) -> int:
        """Tokens that are predicted in those rows: all but the first of each."""
        return int((self._lengths[indices] - 1).sum())


class LinkedRows(SlicedRows):
    """Windows of which each begins with the last token of the one before: every token but the first is predicted once.

    What the last one lacks is id 0.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int) -> None:
        starts = np.arange(0, len(tokens) - 1, seq_len - 1)
        super().__init__(tokens, seq_len, starts, len(tokens) - starts)


class PaddedRows(SlicedRows):
    """Row i is document i, its EOS included, cut or padded to seq_len.

    Layout of one token, in which nothing is predicted, are left out.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int, padding: Padding) -> None:
        parts = [
            np.flatnonzero(tokens[start : start + TOKENS_AT_A_TIME] == padding.eos_id) + start + 1
            for start in range(0, len(tokens), TOKENS_AT_A_TIME)
        ]
        ends = np.unique(np.concatenate([*parts, [len(tokens)]]))  # the last document may have been cut by max_tokens
        starts = np.concatenate([[0], ends[:-1]])
        used = ends - starts >= 2
        super().__init__(tokens, seq_len, starts[used], (ends - starts)[used], padding.pad_id)


class MaskedRows:
    """The rows of `windows`, in each of which the documents are as if they were alone.

    What a row has of a document begins at position 0 and sees nothing before it, also where the row before has the
    document's beginning. Its first token is not predicted.
    """

    def __init__(self, windows: PackedRows | LinkedRows, eos_id: int) -> None:
        self._windows, self._eos_id = windows, eos_id

    def __len__(self) -> int:
        return len(self._windows)

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Those of the windows, and `position_ids`, by which transformers tells the documents apart."""
        batch = self._windows.batch(indices)
        ends = batch["input_ids"][:, :-1] == self._eos_id
        begins = F.pad(ends, (1, 0), value=True)
        labels = batch["labels"].masked_fill(begins, IGNORED_LABEL)
        return {**batch, "labels": labels, "position_ids": positions(begins)}

    def num_predicted(self, indices: np.ndarray) -> int:
        """Tokens that are predicted in those rows: all but the first of each document."""
        return int((self.batch(indices)["labels"][:, 1:] != IGNORED_LABEL).sum())


class MixedRows:
    """The rows of several corpora, one corpus after the other."""

    def __init__(self, corpora: Sequence[PackedRows | MaskedRows | PaddedRows]) -> None:
        self._corpora = corpora
        self._first = np.cumsum([0, *map(len, corpora)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def batch(self, indices: np.ndarray) -> dict[str, Tensor]:
        """Those of the corpora, in the order of `indices`."""
        of = self._corpus_of(indices)
        order = np.argsort(of, kind="stable")  # corpus by corpus
        batches = [self._corpora[number].batch(mine) for number, mine in self._by_corpus(indices)]
        back = torch.from_numpy(np.argsort(order, kind="stable"))
        return {name: torch.cat([batch[name] for batch in batches])[back] for name in batches[0]}

    def num_predicted(self, indices: np.ndarray) -> int:
        """Tokens that are predicted in those rows."""
        return sum(self._corpora[number].num_predicted(mine) for number, mine in self._by_corpus(indices))

    def _corpus_of(self, indices: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._first, indices, side="right") - 1

    def _by_corpus(self, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (number of a corpus, the places in it of those `indices` that are its)."""
        of = self._corpus_of(indices)
        for number in np.unique(of):
            yield int(number), indices[of == number] - self._first[number]


def training_rows(tokens: np.ndarray, seq_len: int, layout: Layout) -> PackedRows | MaskedRows | PaddedRows:
    """Return the rows of a training split."""
    if isinstance(layout, Padding):
        return PaddedRows(tokens, seq_len, layout)
    windows = PackedRows(tokens, seq_len)
    return windows if layout is None else MaskedRows(windows, layout.eos_id)


def evaluation_rows(tokens: np.ndarray, seq_len: int, layout: Layout) -> LinkedRows | MaskedRows | PaddedRows:
    """Return the rows of a validation split. ValueError where they leave nothing to predict."""
    seen = tokens[:-1]
    if seq_len < 2 or not (len(seen) if layout is None else (seen != layout.eos_id).any()):
        raise ValueError(
            f"data.validation: {len(tokens)} tokens in rows of data.seq_len {seq_len} leave nothing to "
            f"predict; both must be at least 2"
        )
    if isinstance(layout, Padding):
        return PaddedRows(tokens, seq_len, layout)
    windows = LinkedRows(tokens, seq_len)
    return windows if layout is None else MaskedRows(windows, layout.eos_id)


def positions(begins: Tensor) -> Tensor:
    """Return the position of each token in its document, `[rows, length]` int64. begins: where one begins, bool."""
    places = torch.arange(begins.shape[1]).expand(begins.shape)
    return places - places.where(begins, 0).cummax(dim=1).values
