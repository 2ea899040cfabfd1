"""Two genuine nodes: two network namespaces that share nothing but a cable, a launcher of its own in each."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch.scripts import SCRIPTS, start
from tests.training.runs import losses, run, status

ADDRESSES = ("10.213.77.1", "10.213.77.2")


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@pytest.fixture
def nodes():
    """The names of two network namespaces, joined by a veth pair whose ends are called `cable`."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to make network namespaces")
    if shutil.which("ip") is None:
        pytest.skip("needs the program ip (Debian and Ubuntu: apt install iproute2)")
    names = [f"relora{os.getpid()}-{node}" for node in (0, 1)]
    try:
        try:
            for name in names:
                ip("netns", "add", name)
            ip("link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns", names[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"network namespaces cannot be made here: {' '.join(error.cmd)}: {error.stderr.strip()}")
        for name, address in zip(names, ADDRESSES, strict=True):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            ip("-n", name, "link", "set", "cable", "up")
            ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)


def run_on(nodes: list[str], directories: list[Path], *arguments: str, timeout: float = 600) -> list[tuple[int, str]]:
    """`multi_node.sh --no_ssh` on both nodes, each in a directory of its own: exit code and output of each."""
    hostfile = directories[0].parent / "hostfile"
    hostfile.write_text("\n".join(f"{address} slots=1" for address in ADDRESSES))
    launchers = [
        start(
            "ip",
            "netns",
            "exec",
            node,
            "bash",
            SCRIPTS / "multi_node.sh",
            "--no_ssh",
            "--node_rank",
            rank,
            "--hostfile",
            hostfile,
            *arguments,
            cwd=directory,
            GLOO_SOCKET_IFNAME="cable",
        )
        for rank, (node, directory) in enumerate(zip(nodes, directories, strict=True))
    ]
    try:
        return [
            (launcher.wait(), output) for launcher in launchers for output in [launcher.communicate(timeout=timeout)[0]]
        ]
    finally:
        for launcher in launchers:
            launcher.terminate()  # multi_node.sh passes it on
            launcher.wait()


def received(node: str) -> int:
    """Bytes that came over the cable to this node."""
    found = subprocess.run(["ip", "-n", node, "-s", "-j", "link", "show", "cable"], check=True, capture_output=True)
    return json.loads(found.stdout)[0]["stats64"]["rx"]["bytes"]


def files(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_two_nodes_compute_what_two_ranks_of_one_node_do(nodes, tmp_path):
    settings = ["tiny", "warm_start_steps=4", "relora.restart_every=4", "train.steps=10"]
    run(tmp_path / "one_node", *settings[1:])
    directories = [tmp_path / "node_0", tmp_path / "node_1"]
    for directory in directories:
        directory.mkdir()
    done = run_on(nodes, directories, *settings)
    assert [code for code, _ in done] == [0, 0], done[0][1] + done[1][1]

    run_dir = directories[0] / "runs" / "tiny"
    assert status(run_dir)["state"] == "done"
    assert len(losses(run_dir)) == 10
    assert losses(run_dir) == losses(tmp_path / "one_node")  # to the last digit
    assert "restart 1: merged" in done[0][1] and "2 ranks (CPU)" in done[0][1]
    assert done[1][1].count("\n") < 5, done[1][1]  # rank 0 talks
    sent = json.loads((run_dir / "summary.json").read_text())["bytes_wire"]
    assert min(received(node) for node in nodes) > sent / 2  # and it went over the cable
    # Node 0 writes the run; node 1, on a disk of its own, its own part of the checkpoint, and nothing else.
    names = {name.removeprefix("runs/tiny/checkpoints/") for name in files(directories[1])}
    assert names == {
        "latest",
        *(
            f"step_00000010/{name}"
            for name in ("manifest.json", "config.json", "trained_00001.safetensors", "frozen_00001.safetensors")
        ),
    }
