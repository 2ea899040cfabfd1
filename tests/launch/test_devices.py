"""What the launch scripts say about devices, and what multi_node.sh takes along, before anything is started."""

import pytest

from tests.launch.scripts import SCRIPTS, run

# Enough of PyTorch for a script to count the GPUs.
TWO_GPUS = """
class accelerator:
    is_available = staticmethod(lambda: True)
    current_accelerator = staticmethod(lambda: type("device", (), {"type": "cuda"}))

class cuda:
    device_count = staticmethod(lambda: 2)
"""
PDSH = """#!/usr/bin/env bash
printf '%s' "$*" >"$SEEN"
"""


@pytest.fixture
def two_gpus(tmp_path) -> dict[str, str]:
    """Variables with which PyTorch sees two GPUs."""
    (tmp_path / "path" / "torch").mkdir(parents=True)
    (tmp_path / "path" / "torch" / "__init__.py").write_text(TWO_GPUS)
    return {"PYTHONPATH": str(tmp_path / "path")}


def test_more_ranks_than_gpus_are_refused(two_gpus, tmp_path):
    (tmp_path / "hosts").write_text("gpu07 slots=2\ngpu08 slots=4\n")
    code, printed = run(
        "bash",
        SCRIPTS / "multi_node.sh",
        "--no_ssh",
        "--node_rank",
        "1",
        "--hostfile",
        "hosts",
        "tiny",
        cwd=tmp_path,
        **two_gpus,
    )
    assert code == 1 and printed.splitlines()[-1].startswith(
        "error: hosts: gpu08 has slots=4, but PyTorch sees 2 GPU(s) here, and each rank needs one"
    ), printed


def test_the_cores_of_a_machine_are_shared_by_its_slots(tmp_path):
    """The number is also what sets the threads of a rank, where the user does not."""
    (tmp_path / "hosts").write_text("first slots=1\nsecond slots=2\n")
    code, printed = run(
        "bash",
        "-c",
        f"unset OMP_NUM_THREADS; exec bash {SCRIPTS}/multi_node.sh --no_ssh "
        "--node_rank 1 --hostfile hosts tiny relora.r=0",
        cwd=tmp_path,
    )
    assert code != 0 and "node 1 of 2: 2 rank(s); node 0 is first:29500" in printed, printed


@pytest.mark.parametrize("name", ["single_node.sh", pytest.param("quickstart.sh", marks=pytest.mark.slow)])
def test_devices_that_are_not_supported_are_refused_by_name(name, tmp_path):
    code, printed = run(
        "bash", SCRIPTS / name, *(["tiny"] if name == "single_node.sh" else []), cwd=tmp_path, DS_ACCELERATOR="xpu"
    )
    assert code == 1, printed
    assert printed.splitlines()[-1].startswith("error: accelerator: DeepSpeed would compute on xpu devices")
    assert "Traceback" not in printed and not list(tmp_path.iterdir())


def test_over_ssh_the_variables_of_networks_and_devices_are_taken_along(tmp_path):
    for name, text in (("ssh", "#!/usr/bin/env bash\n"), ("pdsh", PDSH)):
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    (tmp_path / "hosts").write_text("gpu07 slots=1\ngpu08 slots=1\n")
    names = [
        "NCCL_DEBUG",
        "UCX_TLS",
        "FI_PROVIDER",
        "PYTORCH_ALLOC_CONF",
        "CUDA_MODULE_LOADING",
        "CUDA_VERSION",
        "DEEPSPEED_TIMEOUT",
        "TORCH_CUDA_ARCH_LIST",
        "DS_ACCELERATOR",
    ]
    values = {
        **dict.fromkeys(names, "7"),
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_TOKEN": "secret",
        "OTHER": "7",
        "SEEN": str(tmp_path / "seen"),
    }
    code, printed = run(
        "bash",
        "-c",
        f"PATH={tmp_path / 'bin'}:$PATH exec bash {SCRIPTS}/multi_node.sh --hostfile hosts --master_addr gpu07 tiny",
        cwd=tmp_path,
        **values,
    )
    assert code == 0, printed
    seen = (tmp_path / "seen").read_text()
    assert [name for name in names if f"export {name}=" not in seen] == []
    assert [name for name in ("CUDA_VISIBLE_DEVICES", "HF_TOKEN", "OTHER") if f"export {name}=" in seen] == []
