"""The endless order in which a run takes the rows of its corpora; the same on every rank, for every world size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np


class ShuffledOrder:
    """Rows of one corpus: one permutation per epoch, seeded by (seed, epoch).

    Attributes:
        taken: rows so far, over all epochs.
    """

    def __init__(self, num_rows: int, seed: int, *stream: int) -> None:
        """stream: further integers of the seed, which keep the corpora of a mixture apart."""
        self.num_rows, self.taken = num_rows, 0
        self._seed = [seed, *stream]
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def take(self, count: int) -> np.ndarray:
        """Return the numbers of the next rows, `[count]` int64."""
        parts = [np.empty(0, dtype=np.int64)]
        stop = self.taken + count
        while self.taken < stop:
            epoch, position = divmod(self.taken, self.num_rows)
            some = min(stop - self.taken, self.num_rows - position)
            parts.append(self._permutation(epoch)[position : position + some])
            self.taken += some
        return np.concatenate(parts)

    def skip(self, count: int) -> None:
        """Leave out so many rows."""
        self.taken += count

    def state_dict(self) -> dict[str, int]:
        """Return where the next row is."""
        epoch, position = divmod(self.taken, self.num_rows)
        return {"epoch": epoch, "position": position}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a `state_dict`. Raises ValueError if it cannot be one of this corpus."""
        epoch, position = state.get("epoch", -1), state.get("position", -1)
        if epoch < 0 or not 0 <= position < self.num_rows:
            raise ValueError(f"{dict(state)} does not fit a corpus of {self.num_rows} sequences")
        self.taken = epoch * self.num_rows + position

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            seed, *stream = self._seed
            self._order = np.random.default_rng([seed, epoch, *stream]).permutation(self.num_rows)
            self._epoch = epoch
        return self._order


class MixedOrder:
    """Rows of several corpora in fixed proportions: after k rows, less than one row from weight · k of each.

    Which corpus is next is decided by the quota method of Balinski and Young (American Mathematical Monthly 82, 1975):
    of those whose share, with this row, does not exceed ⌈weight · k⌉, the one that would fall below its share first.
    It depends on the rows taken so far and on nothing else, so they are the whole state. Each corpus has its own
    shuffled epochs.

    Row numbers are those of all corpora one after the other, in the order of `num_rows`.
    """

    def __init__(self, num_rows: Sequence[int], weights: Sequence[float], seed: int) -> None:
        assert len(num_rows) == len(weights) > 0
        self._orders = [ShuffledOrder(number, seed, index) for index, number in enumerate(num_rows)]
        self._first = np.cumsum([0, *num_rows[:-1]])
        # As integers, so that the decision is exact on every machine: 0.1 is one tenth.
        exact = [Fraction(repr(float(weight))) for weight in weights]
        common = math.lcm(*(share.denominator for share in exact))
        self._weights = [int(share * common) for share in exact]

    @property
    def taken(self) -> int:
        """Rows so far, of all corpora."""
        return sum(order.taken for order in self._orders)

    @property
    def taken_of_each(self) -> list[int]:
        """Rows so far of each corpus."""
        return [order.taken for order in self._orders]

    def take(self, count: int) -> np.ndarray:
        """Return the numbers of the next rows, `[count]` int64."""
        chosen = self._choose(count)
        rows = np.empty(count, dtype=np.int64)
        for index, order in enumerate(self._orders):
            places = chosen == index
            rows[places] = order.take(int(places.sum())) + self._first[index]
        return rows

    def skip(self, count: int) -> None:
        """Leave out so many rows, each corpus its share."""
        for order, number in zip(
            self._orders, np.bincount(self._choose(count), minlength=len(self._orders)), strict=True
        ):
            order.skip(int(number))

    def state_dict(self) -> dict[str, list[int]]:
        """Return where the next row is: the rows that were taken of each corpus."""
        return {"taken": self.taken_of_each}

    def load_state_dict(self, state: dict) -> None:
        """Continue from a `state_dict`. Raises ValueError if it cannot be one of these corpora."""
        taken = state.get("taken", [])
        if len(taken) != len(self._orders) or min(taken) < 0:
            raise ValueError(f"{dict(state)} does not fit a mixture of {len(self._orders)} corpora")
        for order, number in zip(self._orders, taken, strict=True):
            order.taken = number

    def _choose(self, count: int) -> np.ndarray:
        """Return the corpus of each of the next rows, `[count]`; takes none."""
        taken, weights, total = self.taken_of_each, self._weights, sum(self._weights)
        chosen = np.empty(count, dtype=np.int64)
        start = sum(taken)
        for place in range(count):
            due = start + place + 1
            below = [i for i, weight in enumerate(weights) if taken[i] * total < weight * due]
            index = min(below, key=lambda i: Fraction(taken[i] + 1, weights[i]))
            taken[index] += 1
            chosen[place] = index
        return chosen
