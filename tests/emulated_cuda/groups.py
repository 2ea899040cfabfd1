"""torch.distributed: groups that are called NCCL's and are gloo's."""

import functools
import inspect

import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from tests.emulated_cuda.memory import HOST
from tests.emulated_cuda.patches import Patches
from tests.emulated_cuda.rules import DeviceError


def patch(gpu, patches: Patches) -> None:
    """Have process groups of NCCL run on gloo; those that ask for gloo are of the host (`gpu.host_groups`)."""
    real_init, real_group, real_backend = c10d.init_process_group, c10d.new_group, c10d.get_backend

    @functools.wraps(real_init)
    def init_process_group(backend=None, *args, device_id=None, **kwargs):
        if device_id is not None and gpu.device(device_id) != gpu.current_device:
            raise DeviceError(f"device_id {device_id}, but the current device is {gpu.current_device}")
        real_init("gloo" if backend == "nccl" else backend, *args, **kwargs)

    init_process_group.__signature__ = inspect.signature(real_init)  # DeepSpeed looks for device_id in it

    @functools.wraps(real_group)
    def new_group(*args, backend=None, **kwargs):
        group = real_group(*args, backend="gloo" if backend == "nccl" else backend, **kwargs)
        if backend == "gloo" and group is not None:
            gpu.host_groups.add(group.group_name)
        return group

    def is_of_the_host(group) -> bool:
        return getattr(group, "group_name", None) in gpu.host_groups

    def get_backend(group=None):
        return real_backend(group) if is_of_the_host(group) else "nccl"

    for module in (c10d, dist):
        patches.set(module, init_process_group=init_process_group, new_group=new_group, get_backend=get_backend)
    patches.set(c10d, _get_object_coll_device=lambda group=None: HOST if is_of_the_host(group) else gpu.current_device)
