"""What one rank contributes to a checkpoint, and how the tensors in its files are named.

In `trained_RANK.safetensors`, whose metadata have the ranges of the flattened parameters:

    master/NAME, exp_avg/NAME, exp_avg_sq/NAME      1-D, fp32
    buffer/NAME                                     persistent buffers, of rank 0
    owner/NAME/WHAT                                 state of the optimizer of an owned weight, or candidates for A and B
                                                    of a layer and whose turn it is, whole, of its owner
    islands/KIND/NAME                               anchors, outer momenta and errors of compression, in fp32, of owners
    residual/NAME                                   gradients of a frozen weight, summed up within a period, `[out, in]`
                                                    in fp32, of its owner

In `frozen_RANK.safetensors`, whole tensors by their owners:

    NAME.weight                 the fp32 value of a merged weight: its master, or a stored copy that is exact
    stored/NAME.weight          the stored copy, where it is all there is
    intended/, lost/NAME        the sums of the merge ledger
    frozen/NAME.lora_A          A of a one-sided layer, in fp32
    frozen/NAME                 what no layer merges into and nothing trains, as it is stored; of rank 0
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

PARTS = ("master", "exp_avg", "exp_avg_sq")
BUFFER = "buffer/"
STORED, INTENDED, LOST, OTHER = "stored/", "intended/", "lost/", "frozen/"
RANGES = "ranges"  # key of a file's metadata: JSON, {parameter: [start, stop]}

DECAY = "decay"  # key of the engine's state: ρ, what weight decay has left of the frozen weights since the last merge

RESIDUAL = "residual"  # key of the engine's state: {"steps": of the period so far, "count": of the updates so far}
RESIDUAL_SUM = "residual/"

OWNERS = "owners"  # key of the engine's state: the optimizers of owned weights, or what is switched, as a text
OWNER_STATE = "owner/"

ISLANDS = "islands"  # key of the engine's state: {"round": exchanges so far, "t": the step of the newest}
ISLAND_PART = "islands/"

Ranges = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Captured:
    """What this rank writes: tensors on the CPU that training does not change.

    Attributes:
        trained: `PART/NAME`, 1-D, fp32; on rank 0 also `buffer/NAME`; `residual/NAME` and
            `islands/KIND/NAME` of owned weights.
        ranges: `{NAME: (start, stop)}` of `trained` in the flattened parameters.
        frozen: whole tensors; None where they are what was written before.
        engine, model: for the manifest.
    """

    trained: dict[str, Tensor]
    ranges: Ranges
    frozen: dict[str, Tensor] | None
    engine: dict
    model: dict

    def contents(self) -> tuple[Ranges, list[str]]:
        """Return the ranges and the frozen tensors' names: what the ranks together must have all of."""
        return self.ranges, list(self.frozen or ())

    def gaps(self, contents: list[tuple[Ranges, list[str]]]) -> str | None:
        """Return what is in the `contents` of no rank; None where everything is."""
        frozen = {name.removeprefix(STORED) for _, names in contents for name in names}
        for name, about in self.model["parameters"].items():
            end = 0
            for start, stop in sorted(ranges[name] for ranges, _ in contents if name in ranges):
                end = max(end, stop) if start <= end else end
            if about["trains"] and end < torch.Size(about["shape"]).numel():
                return f"no rank has written all of {name}"
        for name, layer in self.model["layers"].items():
            if self.frozen is not None and layer["base"] and f"{name}.weight" not in frozen:
                return f"no rank has written {name}.weight"
            if self.frozen is not None and layer.get("one_sided") and f"{OTHER}{name}.lora_A" not in frozen:
                return f"no rank has written {name}.lora_A"
        return None


class Source(Protocol):
    """What checkpoints are written of: an engine."""

    @property
    def cycle(self) -> int:
        """Return a number that changes whenever frozen weights do: the restarts and other updates of them so far."""

    def capture(self, peers: list[int], with_frozen: bool) -> Captured:
        """Copy this rank's part of the state to the CPU. Collective.

        Args:
            peers: the ranks that share this rank's directory, this one among them.
            with_frozen: also what is frozen.

        Returns:
            Copies that stay as they are until the next call.
        """

    def write_config(self, directory: Path) -> list[str]:
        """Write the model's configuration; return the names of the files."""
