"""The tensors in the files of a checkpoint, as one process reads them: by name, and by range."""

import json
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from relora_ds.checkpoint.contents import RANGES
from relora_ds.checkpoint.manifest import FROZEN, TRAINED, DamagedError, Manifest, UnreadableError


class SavedTensors:
    """The tensors in the files of a checkpoint, as far as this host sees them; opened, not read.

    Args:
        stack: closes the files.
    """

    def __init__(self, directory: Path, manifest: Manifest, stack: ExitStack):
        self._directory, self._manifest = directory, manifest
        self._files: dict[str, safe_open] = {}  # by the name of a whole tensor
        self._ranges: dict[str, list[tuple[int, int, safe_open]]] = defaultdict(list)
        for name in sorted(manifest.files):
            path = directory / name
            if path.suffix != ".safetensors" or not path.is_file():
                continue
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise DamagedError(f"{path} is no safetensors file ({error})") from error
            except OSError as error:
                raise UnreadableError(f"{path} cannot be read now: {error.strerror or error}") from error
            self._files |= dict.fromkeys(file.keys(), file)
            for parameter, (start, stop) in json.loads((file.metadata() or {}).get(RANGES, "{}")).items():
                self._ranges[parameter].append((start, stop, file))

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of the whole tensors that begin with `prefix`."""
        return [name for name in self._files if name.startswith(prefix)]

    def read(self, name: str) -> Tensor:
        """Read a whole tensor."""
        if name not in self._files:
            raise DamagedError(self.reason(name, FROZEN))
        return self._files[name].get_tensor(name)

    def read_range(self, part: str, parameter: str, start: int, stop: int) -> Tensor:
        """Read `[start, stop)` of a flattened parameter's master or moment, fp32, from all files."""
        value = torch.empty(stop - start)
        if not self.has_range(parameter, start, stop):
            raise DamagedError(self.reason(f"{part} of {parameter}", TRAINED))
        for low, high, first, file in self._pieces(parameter, start, stop):
            value[low - start : high - start] = file.get_slice(f"{part}/{parameter}")[low - first : high - first]
        return value

    def has(self, name: str) -> bool:
        """Return True if this host sees a whole tensor of this name."""
        return name in self._files

    def has_range(self, parameter: str, start: int, stop: int) -> bool:
        """Return True if this host sees all of `[start, stop)` of a flattened parameter."""
        return self._num_found(parameter, start, stop) == stop - start

    def _pieces(self, parameter: str, start: int, stop: int) -> list[tuple]:
        pieces = [(max(start, first), min(stop, last), first, file) for first, last, file in self._ranges[parameter]]
        return [piece for piece in pieces if piece[0] < piece[1]]

    def _num_found(self, parameter: str, start: int, stop: int) -> int:
        return sum(high - low for low, high, *_ in self._pieces(parameter, start, stop))

    def reason(self, what: str, kind: str) -> str:
        """Return why a tensor is missing. kind: of the files that should have it."""
        unseen = [
            f"{name} (of host {file.host})"
            for name, file in self._manifest.files.items()
            if name.startswith(kind) and not (self._directory / name).is_file()
        ]
        reason = f"this host does not see {', '.join(unseen[:4])}" if unseen else "no file has it"
        return (
            f"{self._directory}: {what} is missing: {reason}; run_dir should be on a file system that all hosts "
            "share, else the same hosts with the same number of ranks can resume"
        )
