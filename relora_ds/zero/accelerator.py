"""What the ranks of this machine compute on. DeepSpeed is asked, because its engine goes by its own answer.

CUDA devices (ROCm's are such to PyTorch) and the CPU are supported. `torch.cuda.is_available()` agrees with DeepSpeed
wherever `problems` finds nothing; elsewhere the engine and the library would compute on different devices.
"""

import logging
import os
import time

import torch

SUPPORTED = ("cuda", "cpu")
# DeepSpeed's launcher sets CUDA_VISIBLE_DEVICES for its ranks, also where it has itself found no GPU.
_REMEDY = (
    'hide the GPUs with CUDA_VISIBLE_DEVICES="" to train on the CPU, and start with torchrun or single_node.sh, '
    "because the deepspeed command shows them to its ranks again"
)


def is_cuda() -> bool:
    """Return whether ranks compute on CUDA devices."""
    return _name() == "cuda"


def backend() -> str:
    """Return the backend of `torch.distributed` for tensors of the ranks' devices."""
    return "nccl" if is_cuda() else "gloo"


def device_of_rank() -> torch.device:
    """Return the device that this rank computes on."""
    return torch.device("cuda", _local_rank()) if is_cuda() else torch.device("cpu")


def now(device: torch.device) -> float:
    """Return seconds on a clock, when all that the device was given is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def computes_bf16() -> bool:
    """Return whether the ranks of this machine have GPUs that compute in bf16. The same answer on all of them."""
    return is_cuda() and _without_bf16() is None


def problems() -> list[str]:
    """Return why the ranks of this machine cannot compute on its devices, one line with its remedy; usually nothing."""
    chosen = os.environ.get("DS_ACCELERATOR", "")
    if chosen and chosen not in SUPPORTED:  # DeepSpeed cannot even be imported where its packages are missing
        return [_unsupported(chosen)]
    name = _name()
    if name not in SUPPORTED:
        return [_unsupported(name)]
    has_gpu = torch.cuda.is_available()
    if name == "cpu" and has_gpu:
        return [f"DS_ACCELERATOR: cpu keeps DeepSpeed off the GPUs that PyTorch uses here; unset it, or {_REMEDY}"]
    if name == "cuda" and not has_gpu:
        return [
            "DS_ACCELERATOR: cuda, but PyTorch sees no GPU here; look at CUDA_VISIBLE_DEVICES, the driver and "
            "whether torch is a CUDA build, or unset it to train on the CPU"
        ]
    return rank_problems(_local_ranks())


def precision_problems(precision: str) -> list[str]:
    """Return why this machine cannot compute in `precision`: a GPU older than bf16. A CPU computes in all of them."""
    if precision != "bf16" or not is_cuda() or (device := _without_bf16()) is None:
        return []
    major, minor = torch.cuda.get_device_capability(device)
    return [
        f"precision: bf16, but GPU {device} ({torch.cuda.get_device_name(device)}, compute capability "
        f"{major}.{minor}) only emulates it; use fp16 or fp32, or GPUs of compute capability 8.0 or newer"
    ]


def rank_problems(ranks: int) -> list[str]:
    """Return why so many ranks cannot compute on this machine: it has GPUs, but too few."""
    gpus = torch.cuda.device_count()
    if gpus == 0 or ranks <= gpus:
        return []
    return [
        f"LOCAL_RANK: {ranks} ranks on this machine, but PyTorch sees {gpus} GPU(s) here, and each rank needs one; "
        f"start {gpus} (deepspeed --num_gpus {gpus}, torchrun --nproc_per_node {gpus}), or {_REMEDY}"
    ]


def _without_bf16() -> int | None:
    """Return the first GPU among those of this machine's ranks that has no bf16. Nothing is begun on any of them."""
    if torch.version.hip is not None:
        return None
    return next((index for index in range(_local_ranks()) if torch.cuda.get_device_capability(index) < (8, 0)), None)


def _unsupported(name: str) -> str:
    return (
        f"accelerator: DeepSpeed would compute on {name} devices, and relora_ds is made for CUDA devices (ROCm's "
        "too) and the CPU; set DS_ACCELERATOR=cpu to train on the CPU"
    )


def _name() -> str:
    """DeepSpeed's name for the kind of device: cuda, cpu, xpu, npu, hpu, mps …"""
    logger = logging.getLogger("DeepSpeed")
    before, logger.disabled = logger.disabled, True  # it warns, at its import, where it finds nothing but a CPU
    try:
        from deepspeed.accelerator import get_accelerator

        return get_accelerator().device_name()
    finally:
        logger.disabled = before


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def _local_ranks() -> int:
    """Return the ranks on this machine: torchrun's variable or DeepSpeed's, else those up to this one."""
    return max(int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1), _local_rank() + 1)
