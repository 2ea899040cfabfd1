"""What this machine has, and what of it would keep a run from starting. Nothing raises: a broken part is a finding.

The findings are `(section, name, value)` lines, and problems with a remedy each; an essential one means that nothing
can be trained.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from relora_ds.utils.versions import LIBRARIES, version_of

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

VARIABLES = (
    "NCCL_",
    "GLOO_",
    "CUDA_VISIBLE_DEVICES",
    "DS_ACCELERATOR",
    "HF_HUB_OFFLINE",
    "HF_HOME",
    "HF_ENDPOINT",
    "MASTER_ADDR",
    "MASTER_PORT",
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "OMP_NUM_THREADS",
    "SLURM_JOB_ID",
    "SLURM_NNODES",
    "SLURM_NTASKS",
    "SLURM_STEP_NODELIST",
    "RELORA_DS_VERBOSE",
)
HUB_SECONDS = 4.0


@dataclass
class Findings:
    """Attributes: facts: (section, name, value); essential, others: problems, one sentence each with its remedy."""

    facts: list[tuple[str, str, str]] = field(default_factory=list)
    essential: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


def examine() -> Findings:
    """Look at everything. Takes seconds: torch is imported, and the hub is asked for a sign of life."""
    found = Findings()
    for section, look in (
        ("software", _software),
        ("devices", _devices),
        ("backends", _backends),
        ("host", _host),
        ("compilers", _compilers),
        ("environment", _environment),
        ("hub", _hub),
    ):
        try:
            look(found)
        except Exception as error:  # a library that is half installed can raise anything
            found.others.append(f"{section}: could not be examined ({type(error).__name__}: {_first_line(error)})")
    return found


def requirements() -> dict[str, str]:
    """`{package: version specifier}` that relora_ds needs: from its installed metadata, else from pyproject.toml."""
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("relora_ds") or []
    except importlib.metadata.PackageNotFoundError:
        lines = _requirements_of_checkout()
    needed = [one for one in map(Requirement, lines) if one.marker is None or one.marker.evaluate({"extra": ""})]
    return {one.name: str(one.specifier) for one in needed}


def _requirements_of_checkout() -> list[str]:
    project = Path(__file__).parents[2] / "pyproject.toml"
    return tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"] if project.is_file() else []


def _software(found: Findings) -> None:
    found.facts.append(("software", "python", platform.python_version()))
    required = requirements()
    for name, wanted in required.items():
        version = version_of(name)
        found.facts.append(("software", name, version or "missing"))
        if problem := _version_problem(name, version, wanted):
            found.essential.append(problem)
    for name in (*LIBRARIES, "flash-attn", "matplotlib"):
        if name in required:
            continue
        found.facts.append(("software", f"{name} (optional)", version_of(name) or "not installed"))


def _version_problem(name: str, version: str | None, wanted: str) -> str | None:
    if version is None:
        return f'{name}: it is not installed; pip install "{name}{wanted}"'
    if not wanted:
        return None
    from packaging.specifiers import SpecifierSet

    if SpecifierSet(wanted).contains(version, prereleases=True):
        return None
    return f'{name}: {version} is not {wanted}; pip install "{name}{wanted}"'


def _devices(found: Findings) -> None:
    import torch

    from relora_ds.lowrank.fp8 import multiplies_fp8
    from relora_ds.zero import accelerator

    found.facts.append(("devices", "CUDA of torch", str(torch.version.cuda)))
    found.essential += accelerator.problems()
    if not torch.cuda.is_available():
        found.facts.append(("devices", "GPUs", "none: training runs on the CPU"))
        if shutil.which("nvidia-smi"):
            found.others.append(
                "devices: nvidia-smi is here, but torch sees no GPU; look at CUDA_VISIBLE_DEVICES, the "
                "driver, and whether torch is a CUDA build"
            )
        return
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        fp8 = "yes" if multiplies_fp8(torch.device("cuda", index)) else "no"
        bf16 = "yes" if about.major >= 8 or torch.version.hip else "no"
        found.facts.append(
            (
                "devices",
                f"GPU {index}",
                f"{about.name}, {about.total_memory / 1e9:.1f} GB, capability "
                f"{about.major}.{about.minor}, bf16 {bf16}, fp8 {fp8}",
            )
        )
    found.facts.append(("devices", "NCCL", ".".join(map(str, torch.cuda.nccl.version()))))


def _backends(found: Findings) -> None:
    import torch
    import torch.distributed as dist

    if not dist.is_available():
        found.essential.append("torch.distributed: this build of torch has none; install one that does")
        return
    for name, available in (
        ("nccl", dist.is_nccl_available),
        ("gloo", dist.is_gloo_available),
        ("mpi", dist.is_mpi_available),
    ):
        found.facts.append(("backends", name, "available" if available() else "no"))
    needed = "nccl" if torch.cuda.is_available() else "gloo"
    if not (dist.is_nccl_available() if needed == "nccl" else dist.is_gloo_available()):
        found.essential.append(
            f"{needed}: this build of torch lacks it, and the ranks talk through it; install a build that has it"
        )


def _host(found: Findings) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found.facts.append(("host", "system", platform.platform()))
    found.facts.append(("host", "cores", str(cores)))
    if "SC_PHYS_PAGES" in os.sysconf_names:
        size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        found.facts.append(("host", "memory", f"{size / 1e9:.1f} GB"))
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).total
        found.facts.append(("host", "/dev/shm", f"{free / 1e9:.1f} GB"))
        if free < 1e9:
            found.others.append(
                f"/dev/shm: {free / 1e6:.0f} MB is little for NCCL between the GPUs of a host; in a "
                "container, start it with --ipc=host or --shm-size=8g"
            )


def _compilers(found: Findings) -> None:
    for name in ("g++", "nvcc", "ninja"):
        found.facts.append(("compilers", name, shutil.which(name) or "none"))
    found.facts.append(
        ("compilers", "needed", "none: relora_ds trains with torch's AdamW, which DeepSpeed need not compile")
    )


def _environment(found: Findings) -> None:
    for name in sorted(os.environ):
        if name.startswith(VARIABLES):
            found.facts.append(("environment", name, os.environ[name]))


def _hub(found: Findings) -> None:
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        found.facts.append(("hub", "Hugging Face hub", "not asked: HF_HUB_OFFLINE is set"))
        return
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answer = _within(HUB_SECONDS, lambda: _status(address))
    found.facts.append(("hub", "Hugging Face hub", f"{address}: {answer}"))
    if answer != "reachable":
        found.others.append(
            f"hub: {address} cannot be reached ({answer}); models and data sets must be local, and "
            "HF_HUB_OFFLINE=1 spares every run the wait"
        )


def _status(address: str) -> str:
    try:
        with urllib.request.urlopen(urllib.request.Request(address, method="HEAD"), timeout=HUB_SECONDS):
            return "reachable"
    except urllib.error.HTTPError:
        return "reachable"  # somebody answers
    except Exception as error:
        return _first_line(getattr(error, "reason", error))


def _within(seconds: float, function: Callable[[], str]) -> str:
    """Return the answer, or "no answer in … s": resolving a name can block for much longer than a timeout."""
    answers: list[str] = []
    thread = threading.Thread(target=lambda: answers.append(function()), daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[0] if answers else f"no answer in {seconds:.0f} s"


def _first_line(error: object) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
