"""Which rank this process is, where `srun` or `mpirun` started it, and the machines of a hostfile.

The DeepSpeed launcher and torchrun set RANK, WORLD_SIZE and LOCAL_RANK. `srun` and `mpirun` say the same under names
of their own; untranslated, their N processes would be N runs of one rank that overwrite each other. Nothing heavy is
imported: this runs before anything reads those variables.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path

# Slurm's step ids from here on are no steps of `srun` (slurm.h: 0xfffffffb is the batch script, 0xfffffffa the shell
# that `salloc` opens). They are printed unsigned or, being 32 bits wide, as negative numbers.
FIRST_RESERVED_STEP = 0xFFFFFFF0
# From here to 65535 nothing is handed out to outgoing connections (Linux: 32768 to 60999).
FIRST_PORT, NUM_PORTS = 61000, 4500
# The same pattern as in launch_scripts/multi_node.sh.
HOST_NAME = re.compile(r"([A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_:][A-Za-z0-9_.:%-]*")
TORCH_PORT = 29500  # what torchrun and DeepSpeed take
VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")


@dataclasses.dataclass(frozen=True)
class _Place:
    """Return this process among those that were started together. None: the launcher does not say."""

    launcher: str
    rank: str
    world_size: str
    local_rank: str | None
    local_size: str | None
    first_host: str | None  # where rank 0 is
    port: int


def set_rank(environment: MutableMapping[str, str] = os.environ) -> None:
    """Set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT from the variables of `srun` or `mpirun`.

    LOCAL_WORLD_SIZE is set too, where the variables say how many processes share the GPUs of this node.

    Nothing changes where RANK is set, or where only one process was started: so in the batch script of a job of many
    tasks, and in an interactive shell. A MASTER_ADDR or MASTER_PORT that is set is kept.

    Raises:
        ValueError: the launcher does not say where rank 0 is, or which process of its node this one is. RANK and
            WORLD_SIZE are set even so.
    """
    if "RANK" in environment:
        return
    # Slurm last: Open MPI and MPICH start their processes through `srun` and leave its variables visible to them.
    place = _open_mpi(environment) or _mpich(environment) or _slurm(environment)
    if place is None:
        return
    environment.update(RANK=place.rank, WORLD_SIZE=place.world_size)
    environment.setdefault("MASTER_PORT", str(place.port))
    if place.local_rank is None:
        if "LOCAL_RANK" not in environment:
            raise ValueError(
                f"{place.launcher} started {place.world_size} processes but does not tell them which of "
                "their node's they are; set LOCAL_RANK for each, or start with torchrun or deepspeed"
            )
    else:
        environment["LOCAL_RANK"] = place.local_rank
    if place.local_size is not None:
        environment["LOCAL_WORLD_SIZE"] = place.local_size
    if not environment.get("MASTER_ADDR"):
        if place.first_host is None:
            raise ValueError(
                f"{place.launcher} started {place.world_size} processes on several nodes but does not "
                "say where rank 0 is; set MASTER_ADDR to the address of its node (Open MPI: "
                "mpirun -x MASTER_ADDR=…, MPICH: mpiexec -genv MASTER_ADDR …)"
            )
        environment["MASTER_ADDR"] = place.first_host


def _open_mpi(environment: Mapping[str, str]) -> _Place | None:
    size = environment.get("OMPI_COMM_WORLD_SIZE", "1")
    if size == "1":
        return None
    return _Place(
        "Open MPI's mpirun",
        environment["OMPI_COMM_WORLD_RANK"],
        size,
        environment.get("OMPI_COMM_WORLD_LOCAL_RANK"),
        environment.get("OMPI_COMM_WORLD_LOCAL_SIZE"),
        "127.0.0.1" if environment.get("OMPI_COMM_WORLD_LOCAL_SIZE") == size else None,
        TORCH_PORT,
    )


def _mpich(environment: Mapping[str, str]) -> _Place | None:
    """MPICH and Intel MPI. `srun --mpi=pmi2` sets PMI_RANK too, but not MPI_LOCALRANKID: that is Slurm's case."""
    size = environment.get("PMI_SIZE", "1")
    if size == "1" or ("MPI_LOCALRANKID" not in environment and _slurm(environment)):
        return None
    return _Place(
        "mpiexec",
        environment["PMI_RANK"],
        size,
        environment.get("MPI_LOCALRANKID"),
        environment.get("MPI_LOCALNRANKS"),
        "127.0.0.1" if environment.get("MPI_LOCALNRANKS") == size else None,
        TORCH_PORT,
    )


def _slurm(environment: Mapping[str, str]) -> _Place | None:
    """Return a task of `srun`.

    SLURM_PROCID and SLURM_NTASKS also exist in a batch script, which is one process whatever the job asks for; the
    SLURM_STEP_ variables are those of `srun`.
    """
    size, step = environment.get("SLURM_STEP_NUM_TASKS", "1"), int(environment.get("SLURM_STEP_ID", -1))
    if size == "1" or not 0 <= step < FIRST_RESERVED_STEP:
        return None
    if "SLURM_PTY_PORT" in environment and environment.get("SLURM_TASK_PID") != str(os.getpid()):
        return None  # typed into the shell of `srun --pty`: the other tasks were shells that ended at once
    nodes = environment.get("SLURM_STEP_NODELIST")
    # SLURM_LAUNCH_NODE_IPADDR is where `srun` was typed, which may be a login node.
    host = "127.0.0.1" if environment.get("SLURM_STEP_NUM_NODES") == "1" else nodes and first_host(nodes)
    local_rank, local_size = environment.get("SLURM_LOCALID"), _tasks_of_node(environment)
    if local_rank and any(re.fullmatch(r"[^,]+", environment.get(name, "")) for name in VISIBLE_DEVICES):
        local_rank, local_size = "0", None  # `--gpus-per-task=1`: each task sees one GPU, which is its number 0
    port = FIRST_PORT + (int(environment.get("SLURM_JOB_ID", 0)) + 1000 * step) % NUM_PORTS
    return _Place("srun", environment["SLURM_PROCID"], size, local_rank, local_size, host or None, port)


def _tasks_of_node(environment: Mapping[str, str]) -> str | None:
    """Return the tasks of this node in SLURM_STEP_TASKS_PER_NODE, whose `4(x2),3` are three nodes."""
    counts = [
        count
        for count, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", environment.get("SLURM_STEP_TASKS_PER_NODE", ""))
        for _ in range(int(nodes or 1))
    ]
    node = int(environment.get("SLURM_NODEID", 0))
    return counts[node] if node < len(counts) else None


def hosts_in(hostfile: Path) -> list[str]:
    """Return the host names of a DeepSpeed hostfile, in its order.

    Raises:
        ValueError: the file cannot be read, or a name is given twice or is none: launchers would take one that begins
            with `-` for an option.
    """
    try:
        lines = hostfile.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(f"--hostfile: {hostfile} cannot be read ({error}); name a text file") from error
    hosts = [line.split()[0] for line in lines if line.strip() and not line.lstrip().startswith("#")]
    for number, host in enumerate(hosts):
        if not HOST_NAME.fullmatch(host):
            raise ValueError(
                f"--hostfile: {host!r} in {hostfile} is not a host name or an address; they begin with a "
                "letter or digit and hold only letters, digits and . _ - : %"
            )
        if host in hosts[:number]:
            raise ValueError(f"--hostfile: {host!r} is in {hostfile} twice; give it one line with all its slots")
    return hosts


def first_host(nodes: str) -> str:
    """Return the first host of a Slurm node list: `rack[3-4]node[007,9-12],login` → `rack3node007`."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).split(",")[0]
