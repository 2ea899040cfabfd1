"""Which rank a process is, from the variables of mpirun and srun; and processes that form one world by them."""

import os
import sys

import pytest

from relora_ds.zero.launchers import first_host, set_rank
from tests.launch.scripts import ROOT, run, start
from tests.training.runs import losses, status

LOCAL = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

# What Slurm 22.05 and Open MPI 4.1 set, as seen in processes of theirs, and what MPICH documents: the variables that
# matter here, and those that mislead.
BATCH_SCRIPT = {
    "SLURM_JOB_ID": "4711",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_TASK_PID": "16360",
}
SRUN = {
    **BATCH_SCRIPT,
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_LAUNCH_NODE_IPADDR": "192.0.2.1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "3", "MPI_LOCALNRANKS": "4"}


def ranks_of(environment: dict[str, str]) -> tuple[str | None, ...]:
    environment = dict(environment)
    set_rank(environment)
    return tuple(environment.get(name) for name in RANKS)


@pytest.mark.parametrize(
    ("environment", "ranks"),
    [
        (OPEN_MPI, ("1", "2", "1", "127.0.0.1", "29500")),
        (MPICH, ("3", "4", "3", "127.0.0.1", "29500")),
        (SRUN, ("5", "8", "1", "gpu07", "61211")),
        ({**SRUN, "SLURM_STEP_NUM_NODES": "1"}, ("5", "8", "1", "127.0.0.1", "61211")),
        ({**SRUN, "SLURM_STEP_ID": "2"}, ("5", "8", "1", "gpu07", "63211")),
        ({**SRUN, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5", "WORLD_SIZE": "1"}, ("5", "8", "1", "10.0.0.1", "5")),
        ({**SRUN, "CUDA_VISIBLE_DEVICES": "3"}, ("5", "8", "0", "gpu07", "61211")),  # --gpus-per-task=1
        ({**SRUN, "CUDA_VISIBLE_DEVICES": "0,1,2,3"}, ("5", "8", "1", "gpu07", "61211")),
        ({**SRUN, "PMI_RANK": "5", "PMI_SIZE": "8"}, ("5", "8", "1", "gpu07", "61211")),  # --mpi=pmi2
        ({**SRUN, **OPEN_MPI}, ("1", "2", "1", "127.0.0.1", "29500")),  # mpirun starts its daemons with srun
        ({**SRUN, **MPICH}, ("3", "4", "3", "127.0.0.1", "29500")),
        ({**SRUN, "SLURM_PTY_PORT": "1", "SLURM_TASK_PID": str(os.getpid())}, ("5", "8", "1", "gpu07", "61211")),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "MASTER_ADDR": "a"}, ("1", "2", "1", "a", "29500")),
    ],
)
def test_the_ranks_of_a_launcher(environment, ranks):
    assert ranks_of(environment) == ranks


@pytest.mark.parametrize(
    "environment",
    [
        {},
        BATCH_SCRIPT,
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"},
        {**SRUN, "SLURM_STEP_ID": "4294967291"},  # the step that is the batch script
        {**SRUN, "SLURM_STEP_ID": "-5"},
        {**SRUN, "SLURM_STEP_ID": "4294967290"},  # salloc's shell
        {**SRUN, "SLURM_PTY_PORT": "1", "SLURM_TASK_PID": "1"},  # in the shell of `srun --pty bash`
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"PMI_RANK": "0", "PMI_SIZE": "1"},
    ],
)
def test_one_process_stays_one_rank(environment):
    assert ranks_of(environment) == tuple(environment.get(name) for name in RANKS)


@pytest.mark.parametrize(
    ("environment", "local"),
    [
        (OPEN_MPI, ("1", "2")),
        (MPICH, ("3", "4")),
        (SRUN, ("1", None)),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "SLURM_NODEID": "1"}, ("1", "4")),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "SLURM_NODEID": "2"}, ("1", "3")),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "CUDA_VISIBLE_DEVICES": "3"}, ("0", None)),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "HIP_VISIBLE_DEVICES": "3"}, ("0", None)),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "ROCR_VISIBLE_DEVICES": "3"}, ("0", None)),
        ({**SRUN, "SLURM_STEP_TASKS_PER_NODE": "4(x2)", "ROCR_VISIBLE_DEVICES": "0,1,2,3"}, ("1", "4")),
    ],
)
def test_the_ranks_that_share_the_gpus_of_a_node(environment, local):
    environment = dict(environment)
    set_rank(environment)
    assert tuple(environment.get(name) for name in LOCAL) == local


def test_what_a_launcher_has_set_stays():
    environment = {**SRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # torchrun, once on each node by srun
    assert ranks_of(environment) == ("0", "1", "0", None, None)


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "set MASTER_ADDR"),
        ({**MPICH, "MPI_LOCALNRANKS": "2"}, "set MASTER_ADDR"),
        ({k: v for k, v in SRUN.items() if k != "SLURM_STEP_NODELIST"}, "set MASTER_ADDR"),
        ({"PMI_RANK": "3", "PMI_SIZE": "4"}, "set LOCAL_RANK"),
    ],
)
def test_a_launcher_that_says_too_little(environment, problem):
    with pytest.raises(ValueError, match=problem):
        set_rank(dict(environment))


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu07", "gpu07"),
        ("gpu07,gpu09", "gpu07"),
        ("gpu[07-08]", "gpu07"),
        ("gpu[12,14-15],login", "gpu12"),
        ("rack[3-4]node[007,9]", "rack3node007"),
        ("a-b[01-02].cluster,c", "a-b01.cluster"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


TWO_TASKS = {
    "mpirun": lambda rank: {**OPEN_MPI, "OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank},
    "srun": lambda rank: {
        **SRUN,
        "SLURM_PROCID": rank,
        "SLURM_LOCALID": rank,
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_STEP_NODELIST": "gpu07",
    },
}


@pytest.mark.parametrize(
    "launcher", [pytest.param("mpirun", marks=pytest.mark.slow), pytest.param("srun", marks=pytest.mark.slow)]
)
def test_two_processes_are_one_run(launcher, tmp_path, free_port):
    processes = [
        start(
            sys.executable,
            ROOT / "train.py",
            "--config",
            "tiny",
            "train.steps=14",
            f"run_dir={tmp_path}",
            MASTER_PORT=free_port,
            **TWO_TASKS[launcher](rank),
        )
        for rank in ("0", "1")
    ]
    try:
        printed = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], printed
    assert "2 ranks (CPU)" in printed[0] and printed[1] == ""
    assert status(tmp_path)["state"] == "done" and len(losses(tmp_path)) == 14


def test_a_missing_address_is_said_once(tmp_path):
    environment = {**OPEN_MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    for rank, expected in (("0", 1), ("1", 0)):
        code, printed = run(
            sys.executable,
            ROOT / "train.py",
            "--config",
            "tiny",
            cwd=tmp_path,
            **{**environment, "OMPI_COMM_WORLD_RANK": rank},
        )
        assert code == 1 and printed.count("error: ") == expected == printed.count("set MASTER_ADDR"), printed
    assert not list(tmp_path.iterdir())
