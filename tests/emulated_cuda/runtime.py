"""torch.cuda, as it is where there are GPUs."""

import contextlib
import types

import torch

from tests.emulated_cuda.memory import HOST
from tests.emulated_cuda.patches import Patches
from tests.emulated_cuda.rules import GpuGenerator

CAPABILITY = (9, 0)
_GIB = 1 << 30


def patch(gpu, patches: Patches) -> None:
    """Have torch.cuda tell of the emulated GPUs."""
    patches.set(torch.cuda, **_devices(gpu), **_memory(gpu), **_streams(gpu), **_random(gpu))
    patches.set(
        torch.cuda,
        **_nothings(
            "init", "_lazy_init", "empty_cache", "ipc_collect", "manual_seed", "manual_seed_all", "set_rng_state"
        ),
    )
    patches.set(torch.cuda.nvtx, **_nothings("range_push", "range_pop"))
    patches.set(torch.cuda.nccl, version=lambda: (2, 27, 5))
    patches.set(torch.version, cuda="12.8")
    patches.set(torch, Generator=_generator_class(), get_default_device=lambda: HOST)


def _nothings(*names: str) -> dict:
    """Functions that do nothing, each its own: torch.compile tells functions by their identity."""
    return {name: lambda *_, **__: None for name in names}


def _devices(gpu) -> dict:
    properties = types.SimpleNamespace(
        name="emulated H100",
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        total_memory=80 * _GIB,
        uuid="0",
        multi_processor_count=132,
        warp_size=32,
        max_threads_per_multi_processor=2048,
        gcnArchName="",
    )

    @contextlib.contextmanager
    def device(index):
        before, gpu.current = gpu.current, gpu.index(index)
        try:
            yield
        finally:
            gpu.current = before

    def set_device(index):
        gpu.current = gpu.index(index)

    def is_bf16_supported(including_emulation=True):
        return True

    return dict(
        is_available=lambda: True,
        device_count=lambda: gpu.devices,
        is_initialized=lambda: True,
        _lazy_call=lambda call, **_: call(),
        current_device=lambda: gpu.current,
        device=device,
        set_device=set_device,
        get_device_properties=lambda device=None: properties,
        get_device_capability=lambda device=None: CAPABILITY,
        get_device_name=lambda device=None: properties.name,
        is_bf16_supported=is_bf16_supported,
        is_current_stream_capturing=lambda: False,
    )


def _memory(gpu) -> dict:
    def live(device=None):
        return gpu.memory.live[gpu.index(device)]

    def peak(device=None):
        return gpu.memory.peak[gpu.index(device)]

    cudart = types.SimpleNamespace(
        cudaHostRegister=lambda address, size, flags: gpu.memory.pinned.register(address, size) or 0,
        cudaHostUnregister=lambda address: gpu.memory.pinned.unregister(address) or 0,
    )
    return dict(
        memory_allocated=live,
        memory_reserved=live,
        max_memory_allocated=peak,
        max_memory_reserved=peak,
        reset_peak_memory_stats=lambda device=None: gpu.memory.reset_peak(gpu.index(device)),
        memory_stats=lambda device=None: {},
        mem_get_info=lambda device=None: (80 * _GIB, 80 * _GIB),
        cudart=lambda: cudart,
    )


def _streams(gpu) -> dict:
    class Stream:
        cuda_stream = stream_id = 0

        def __init__(self, *_, **__):
            self.device = gpu.current_device

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        wait_stream = wait_event = record_event = record = wait = __exit__

        def query(self):
            return True

        def synchronize(self):
            gpu.syncs.note("Stream.synchronize")

    class Event(Stream):
        def elapsed_time(self, other):
            return 1.0

        def synchronize(self):
            gpu.syncs.note("Event.synchronize")

    return dict(
        Stream=Stream,
        Event=Event,
        stream=lambda stream: contextlib.nullcontext(),
        current_stream=Stream,
        default_stream=Stream,
        synchronize=lambda device=None: gpu.syncs.note("torch.cuda.synchronize"),
    )


def _random(gpu) -> dict:
    return dict(
        initial_seed=lambda: 0,
        get_rng_state=lambda device=None: torch.zeros(16, dtype=torch.uint8),
        default_generators=tuple(GpuGenerator() for _ in range(gpu.devices)),
    )


def _generator_class() -> type:
    real = torch.Generator

    class Meta(type(real)):
        def __instancecheck__(cls, thing):
            return isinstance(thing, real)

    class Generator(real, metaclass=Meta):
        def __new__(cls, device="cpu"):
            return GpuGenerator() if torch.device(device).type == "cuda" else real(device)

    return Generator
