"""CUDA's code paths on a machine without a GPU, with real numbers.

    with EmulatedCuda(devices=8) as gpu:      # torch.cuda says that there are 8 GPUs of capability 9.0
        ...                                   # any code; tensors "on cuda" lie in host memory

Tensors are plain ones whose storages carry a mark: the device that they pretend to be on (`memory`). What Python asks
of tensors is patched (`tensors`), every operator that runs is looked at (`operators`): CUDA's and NCCL's demands are
checked (`rules`), what makes the host wait is counted (`syncs`). Process groups are gloo's underneath (`groups`).

It knows nothing of time, streams, CUDA's kernels and their rounding, NCCL's timeouts, or fragmented memory. Tensors
that other threads make are the host's, unless they say where they make them.
"""

import collections
import contextlib

import torch
import torch._dynamo  # it looks functions up by identity: before they are patched
from torch import Tensor

from tests.emulated_cuda import groups, runtime, tensors
from tests.emulated_cuda.memory import HOST, Memory
from tests.emulated_cuda.operators import Operators
from tests.emulated_cuda.patches import Patches
from tests.emulated_cuda.rules import DeviceError
from tests.emulated_cuda.syncs import Syncs

torch._dynamo.trace_rules.get_torch_obj_rule_map()


class EmulatedCuda(contextlib.ExitStack):
    """The emulation, one at a time, for the thread that enters it. Before DeepSpeed is imported, it takes the GPUs.

    Attributes:
        devices: how many GPUs there are.
        current: the index of the current one.
        memory: where tensors are.
        syncs: what made the host wait.
        collectives: how many of each kind there were.
        host_groups: names of the process groups that ask for gloo.
    """

    def __init__(self, devices: int = 8):
        super().__init__()
        self.devices, self.current = devices, 0
        self.memory, self.syncs = Memory(), Syncs()
        self.collectives: collections.Counter[str] = collections.Counter()
        self.host_groups: set[str] = set()
        self.destination: torch.device | None = None

    def __enter__(self):
        super().__enter__()
        patches = self.enter_context(Patches())
        for part in (runtime, groups, tensors):
            part.patch(self, patches)
        self.enter_context(Operators(self))
        return self

    @property
    def current_device(self) -> torch.device:
        return torch.device("cuda", self.current)

    def device(self, device) -> torch.device:
        """A device with its index; an integer is a GPU's."""
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if device.type != "cuda":
            return HOST if device.type == "cpu" else device
        index = self.current if device.index is None else device.index
        if index >= self.devices:
            raise DeviceError(f"CUDA error: invalid device ordinal {index}")
        return torch.device("cuda", index)

    def index(self, device=None) -> int:
        """The index of a GPU; of the current one without an argument."""
        return self.device("cuda" if device is None else device).index

    @contextlib.contextmanager
    def making_on(self, device: torch.device):
        """Have what operators make be on `device`."""
        before, self.destination = self.destination, device
        try:
            yield
        finally:
            self.destination = before

    def note_copy(self, to: Tensor, source: Tensor, non_blocking: bool) -> None:
        """Count a copy between host and GPU for which the host waits."""
        there, here = self.memory.device_of(to), self.memory.device_of(source)
        if there.type == here.type:
            return
        on_host = source if here == HOST else to
        if not (non_blocking and self.memory.is_pinned(on_host)):
            self.syncs.note("copy to the host" if there == HOST else "copy of pageable or blocking memory to the GPU")
