"""Adam's state on one rank, whatever dtype it is kept in: moments are read and written in fp32."""

from typing import Any, Protocol

import torch
from torch import Tensor

from relora_ds.zero.moment_codes import BLOCK, decode, encode

MOMENTS = ("exp_avg", "exp_avg_sq")
_BLOCKS = 4096  # that are written at a time


class Moment(Protocol):
    """A moment of this rank's piece of a parameter, 1-D. is_view: reading it copies nothing."""

    is_view: bool

    def numel(self) -> int:
        """Return its number of elements, which may be 0."""

    def read(self) -> Tensor:
        """Return it in fp32, `[numel]`: a view or a copy, so not to be written to."""

    def write(self, values: Tensor, at: int = 0) -> None:
        """Set the elements from `at` on to `values`, 1-D."""

    def keep(self, mask: Tensor) -> None:
        """Set the elements outside of a bool mask `[numel]` to 0; the others keep their exact values."""


class DenseMoment:
    """A moment in fp32. view: of the optimizer's tensor, 1-D and writable."""

    is_view = True

    def __init__(self, view: Tensor):
        self._view = view

    def numel(self) -> int:
        return self._view.numel()

    def read(self) -> Tensor:
        return self._view

    def write(self, values: Tensor, at: int = 0) -> None:
        self._view[at : at + values.numel()].copy_(values)

    def keep(self, mask: Tensor) -> None:
        self._view.mul_(mask.to(self._view.device))


class QuantizedMoment:
    """Elements `[start, stop)` of a tensor's 8-bit moment. Its neighbours may lie in the blocks at both ends.

    `write` rounds a whole block, the neighbours in it too, unless all of it comes from one block (`moment_codes`).

    Args:
        codes: of the whole tensor, 1-D.
        scales: of its blocks.
        levels: what the codes mean.
    """

    is_view = False

    def __init__(self, codes: Tensor, scales: Tensor, levels: Tensor, start: int, stop: int):
        self._codes, self._scales, self._levels, self._start, self._stop = codes, scales, levels, start, stop

    def numel(self) -> int:
        return self._stop - self._start

    def read(self) -> Tensor:
        first = self._start // BLOCK
        return self._decoded(first, -(-self._stop // BLOCK))[self._start - first * BLOCK :][: self.numel()]

    def write(self, values: Tensor, at: int = 0) -> None:
        start, values = self._start + at, values.to(self._codes.device, torch.float32)
        stop = start + values.numel()
        last = -(-stop // BLOCK)
        for first in range(start // BLOCK, last, _BLOCKS):
            blocks = self._decoded(first, min(last, first + _BLOCKS))
            low, high = max(start, first * BLOCK), min(stop, first * BLOCK + blocks.numel())
            blocks[low - first * BLOCK : high - first * BLOCK] = values[low - start : high - start]
            codes, scales = encode(blocks, self._levels)
            self._codes[first * BLOCK :][: codes.numel()] = codes
            self._scales[first : first + scales.numel()] = scales

    def keep(self, mask: Tensor) -> None:
        self._codes[self._start : self._stop].masked_fill_(~mask.to(self._codes.device), zero_code(self._levels))

    def _decoded(self, first: int, last: int) -> Tensor:
        """Return the values of blocks `[first, last)`; the tensor may end within the last one."""
        return decode(self._codes[first * BLOCK : last * BLOCK], self._scales[first:last], self._levels)


def zero_code(levels: Tensor) -> int:
    """Return the code of 0."""
    return int((levels == 0).nonzero())


class AdamState:
    """What torch's AdamW keeps of a tensor that it steps."""

    _NAMES = dict(zip(MOMENTS, MOMENTS, strict=True))

    def __init__(self, optimizer: torch.optim.Optimizer):
        self._optimizer: Any = optimizer

    def create(self, flat: Tensor, group: int) -> None:
        """Give a tensor of a parameter group zero moments and step 0."""
        # On the host unless it is fused or capturable.
        fused = any(group.get("fused") or group.get("capturable") for group in self._optimizer.param_groups)
        step = torch.zeros((), dtype=torch.float32, device=flat.device if fused else torch.device("cpu"))
        zeros = {key: torch.zeros_like(flat, memory_format=torch.preserve_format).detach() for key in MOMENTS}
        self._optimizer.state[flat].update(step=step, **zeros)

    def zero(self, flat: Tensor) -> None:
        """Set both moments of a tensor to 0."""
        for what in MOMENTS:
            self._optimizer.state[flat][self._NAMES[what]].zero_()

    def moment(self, flat: Tensor, what: str, start: int, stop: int) -> Moment:
        """Return the moment `what` of elements `[start, stop)` of a tensor."""
        return DenseMoment(self._optimizer.state[flat][self._NAMES[what]].detach().view(-1)[start:stop])

    def step(self, flat: Tensor) -> int:
        return int(self._optimizer.state[flat]["step"])

    def set_step(self, flat: Tensor, step: int) -> None:
        self._optimizer.state[flat]["step"].fill_(step)


class AdamState8bit(AdamState):
    """What bitsandbytes' AdamW8bit keeps: moments in 8 bit, or in fp32 for short tensors and groups that ask for it."""

    _NAMES = dict(zip(MOMENTS, ("state1", "state2"), strict=True))

    def create(self, flat: Tensor, group: int) -> None:
        settings = self._optimizer.param_groups[group]
        held, settings["params"] = settings["params"], [flat]  # ZeRO-3 leaves the groups empty between steps
        try:
            self._optimizer.init_state(settings, flat, group, 0)
        finally:
            settings["params"] = held
        self.zero(flat)

    def zero(self, flat: Tensor) -> None:
        state = self._optimizer.state[flat]
        for number in "12":
            levels = state.get(f"qmap{number}")
            state[f"state{number}"].fill_(0 if levels is None else zero_code(levels))

    def moment(self, flat: Tensor, what: str, start: int, stop: int) -> Moment:
        state, codes = self._optimizer.state[flat], self._NAMES[what]
        if state[codes].dtype != torch.uint8:
            return super().moment(flat, what, start, stop)
        number = codes.removeprefix("state")
        return QuantizedMoment(state[codes].view(-1), state[f"absmax{number}"], state[f"qmap{number}"], start, stop)

    def set_step(self, flat: Tensor, step: int) -> None:
        self._optimizer.state[flat]["step"] = step


def adam_state(optimizer: torch.optim.Optimizer) -> AdamState:
    """Return the state of torch's AdamW or bitsandbytes'."""
    return AdamState8bit(optimizer) if hasattr(optimizer, "init_state") else AdamState(optimizer)
