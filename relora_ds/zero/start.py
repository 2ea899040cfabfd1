"""Before an engine exists: the process group."""

import os
import socket
from datetime import timedelta

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.constants import default_pg_timeout
from torch.distributed import distributed_c10d

from relora_ds.zero import accelerator
from relora_ds.zero.launchers import set_rank


def init_distributed() -> None:
    """Start the process group if there is none: from the launcher's environment, or one rank without any launcher.

    Ranks that do not come are waited for as long as DeepSpeed does: 10 minutes, or DEEPSPEED_TIMEOUT of them. So are
    those that do not come to a collective, until `set_timeouts` says otherwise.

    Raises:
        ValueError: this rank has no device that it can compute on.
    """
    set_rank()
    _name_gloo_interface()
    if found := accelerator.problems():
        raise ValueError("\n".join(found))
    if accelerator.is_cuda():
        torch.cuda.set_device(accelerator.device_of_rank())  # or every rank's first collective would run on GPU 0
    else:
        # DeepSpeed would compile a shared-memory collective for CPU: half a minute, and a compiler needed.
        from deepspeed.ops import __compatible_ops__

        __compatible_ops__["deepspeed_shm_comm"] = False
    if not dist.is_initialized() and (store := _store_after_a_restart()) is not None:
        dist.init_process_group(
            accelerator.backend(),
            store=store,
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
            timeout=default_pg_timeout,
        )
    if dist.is_initialized():
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed()
        return
    if "RANK" not in os.environ:
        os.environ.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=os.environ.get("MASTER_PORT", "0"),
        )
    deepspeed.init_distributed(dist_backend=accelerator.backend(), verbose=False)


def _store_after_a_restart() -> dist.Store | None:
    """Return a part of torchrun's store that this attempt has to itself; None where torch's own way is right.

    The store outlives the ranks: those that `--max-restarts` starts would call at the addresses of the dead ones
    (PyTorch issue 167288). Of several nodes each counts attempts of its own; there
    TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 helps.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if (
        attempt == "0"
        or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        or os.environ.get("GROUP_WORLD_SIZE") != "1"
    ):
        return None
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    return dist.PrefixStore(f"relora_ds/attempt_{attempt}", store)


def _name_gloo_interface() -> None:
    """Let gloo take the interface that NCCL is told to take. Ranks on GPUs talk over both.

    NCCL also understands beginnings of names and exclusions; gloo's names are whole ones.
    """
    names = os.environ.get("NCCL_SOCKET_IFNAME", "").removeprefix("=")
    if names and set(names.split(",")) <= {name for _, name in socket.if_nameindex()}:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", names)


def host_group() -> dist.ProcessGroup:
    """Make a group of all ranks for tensors on the host, which wait for each other for a day. Collective.

    Raises:
        RuntimeError: gloo cannot join the ranks.
    """
    try:
        group = dist.new_group(backend="gloo", timeout=default_pg_timeout)  # to join them
    except RuntimeError as error:
        raise RuntimeError(
            f"the ranks cannot talk over gloo, as they do on GPUs too: {error}; name the network "
            "interface that joins their machines in GLOO_SOCKET_IFNAME"
        ) from error
    _set_timeout(group, timedelta(days=1))  # a slow disk is no failure
    return group


def set_timeouts(timeout: timedelta) -> None:
    """Set how long collectives wait for their ranks, in every process group that exists.

    DeepSpeed's collectives run in groups of its own, which have PyTorch's 10 minutes over NCCL whatever the timeout of
    the world's is. Neither library has a public function for it.
    """
    for group in list(distributed_c10d._world.pg_map):
        _set_timeout(group, timeout)


def _set_timeout(group: dist.ProcessGroup, timeout: timedelta) -> None:
    for device in group._device_types:
        group._get_backend(device)._set_default_timeout(timeout)


def leave() -> None:
    """Leave the process group, when the process has nothing more to do in it; it may start another one afterwards."""
    if deepspeed.comm.is_initialized():
        deepspeed.comm.destroy_process_group()  # torch's alone would leave DeepSpeed with groups that are gone
    elif dist.is_initialized():
        dist.destroy_process_group()
