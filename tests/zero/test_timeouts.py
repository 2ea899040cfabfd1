"""How long collectives wait for a rank that does not come."""

import os
import socket
import subprocess
import sys
import time
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from deepspeed.constants import default_pg_timeout
from deepspeed.utils import groups
from torch.distributed import distributed_c10d

from relora_ds.training.hooks.watchdog import Watchdog
from relora_ds.utils.ports import free_port
from relora_ds.zero.start import _name_gloo_interface, host_group, set_timeouts
from tests.ranks import Ranks, ranks
from tests.small_models import llama

DAY = timedelta(days=1)


def timeouts() -> dict[str, timedelta]:
    """Of every process group, by its name: the least of its devices'."""
    return {
        name: min(group._get_backend(device).options._timeout for device in group._device_types)
        for group, name in distributed_c10d._world.pg_names.items()
    }


def watched() -> tuple[dict, dict]:
    """On a rank: the timeouts before and after an engine with a group of its own is watched."""
    set_timeouts(default_pg_timeout)
    watchdog = Watchdog(60, lambda: "step 0", print)
    world = timeouts()
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=5))
    with mock.patch.object(groups, "_WORLD_GROUP", None):
        groups._clone_world_group()  # as deepspeed.initialize does
    watchdog.watch(llama())
    try:
        return world, timeouts()
    finally:
        watchdog.close()
        dist.destroy_process_group(group)
        set_timeouts(default_pg_timeout)


def test_the_watchdog_is_quicker_than_every_collective():
    for world, all_groups in ranks(2).run(watched):
        assert min(world.values()) > DAY
        assert len(all_groups) >= len(world) + 2 and min(all_groups.values()) > DAY


def waiting_for_nobody() -> float:
    """On a rank: how long a collective waits for a rank that comes too late."""
    group = dist.new_group(backend="gloo")
    set_timeouts(timedelta(seconds=2))
    started = time.monotonic()
    try:
        if dist.get_rank() == 0:
            with pytest.raises(RuntimeError, match="(?i)time"):
                dist.all_reduce(torch.zeros(1), group=group)
        return time.monotonic() - started
    finally:
        set_timeouts(default_pg_timeout)


def test_collectives_heed_it():
    own = Ranks(2)  # with those of the session, a broken connection would stay for the tests that follow
    try:
        assert 1 < own.run(waiting_for_nobody)[0] < 60
    finally:
        own.stop()


def test_a_group_on_the_host_waits_for_slow_disks_and_names_what_could_join_it():
    assert ranks(2).run(timeout_of_a_host_group) == [DAY, DAY]
    with (
        mock.patch.object(dist, "new_group", side_effect=RuntimeError("connectFullMesh failed")),
        pytest.raises(RuntimeError, match="connectFullMesh failed; name the .*interface .*GLOO_SOCKET_IFNAME"),
    ):
        host_group()


def timeout_of_a_host_group() -> timedelta:
    group = host_group()
    try:
        return group._get_backend(torch.device("cpu")).options._timeout
    finally:
        dist.destroy_process_group(group)


@pytest.mark.parametrize(
    ("nccl", "gloo", "taken"),
    [
        ("eth1", None, "eth1"),
        ("=eth1", None, "eth1"),
        ("eth0,eth1", None, "eth0,eth1"),
        ("eth1", "eth0", "eth0"),
        ("eth", None, None),
        ("^eth0", None, None),
        ("eth1,eth7", None, None),
        (None, None, None),
    ],
)
def test_gloo_takes_the_interface_of_nccl_where_its_name_is_whole(monkeypatch, nccl, gloo, taken):
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0"), (3, "eth1")])
    said = {"NCCL_SOCKET_IFNAME": nccl, "GLOO_SOCKET_IFNAME": gloo}
    with mock.patch.dict(os.environ):
        for name in said:
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in said.items() if value is not None})
        _name_gloo_interface()
        assert os.environ.get("GLOO_SOCKET_IFNAME") == taken


START = """
import os
from relora_ds.zero.start import init_distributed, leave
init_distributed()
from tests.zero.test_timeouts import timeouts
print("timeouts", {each.total_seconds() for each in timeouts().values()})
leave()
"""


@pytest.mark.parametrize("restarted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_ranks_that_do_not_come_are_waited_for_as_long_as_deepspeed_says(restarted):
    """On both ways to a process group: DeepSpeed's, and the one after torchrun has started the ranks again."""
    port = free_port()
    environment = {
        **os.environ,
        "DEEPSPEED_TIMEOUT": "7",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if restarted:
        environment |= {
            "TORCHELASTIC_RESTART_COUNT": "1",
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "GROUP_WORLD_SIZE": "1",
        }
    torchrun = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False) if restarted else None
    done = subprocess.run([sys.executable, "-c", START], env=environment, capture_output=True, text=True, timeout=300)
    assert "timeouts {420.0}" in done.stdout, done.stderr
    del torchrun  # it kept the store
