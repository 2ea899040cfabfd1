"""skypilot.yaml: what it says agrees with the launch scripts and the exit codes, and its commands run."""

import yaml

from relora_ds.training import exit_codes
from tests.launch.scripts import ROOT, SCRIPTS, run

TASK = yaml.safe_load((SCRIPTS / "skypilot.yaml").read_text(encoding="utf-8"))
# What SkyPilot sets on the second of two machines.
SKYPILOT_SETS = {"SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2"}


def test_a_run_that_was_asked_to_stop_is_started_again():
    assert TASK["resources"]["job_recovery"]["recover_on_exit_codes"] == [exit_codes.PREEMPTED]
    assert TASK["resources"]["job_recovery"]["max_restarts_on_errors"] > 0
    assert TASK["resources"]["use_spot"] is True


def test_every_choice_of_machines_has_as_many_gpus():
    """A run in folders of its own on each machine resumes with as many ranks."""
    numbers = {choice["accelerators"].partition(":")[2] for choice in TASK["resources"]["any_of"]}
    assert len(numbers) == 1


def test_the_commands_start_the_ranks_of_a_machine(tmp_path):
    """In a checkout whose launch script adds a mistake, so that the ranks refuse the recipe."""
    bucket, checkout = tmp_path / "bucket", tmp_path / "checkout"
    (checkout / "launch_scripts").mkdir(parents=True)
    (checkout / "launch_scripts/environment.sh").symlink_to(SCRIPTS / "environment.sh")
    (checkout / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")
    called = f'printf "%s\\n" "$@" >called\nexec bash {SCRIPTS}/multi_node.sh "$@" relora.r=0\n'
    (checkout / "launch_scripts/multi_node.sh").write_text(called)
    (mounted,) = TASK["file_mounts"]
    assert f"{mounted}/" in TASK["run"] and TASK["file_mounts"][mounted]["mode"] == "MOUNT_CACHED"
    commands = TASK["setup"] + TASK["run"].replace(f"{mounted}/", f"{bucket}/")
    code, printed = run("bash", "-c", commands, cwd=checkout, **SKYPILOT_SETS, **TASK["envs"])
    assert code == exit_codes.RECIPE, printed
    assert printed.count("environment: ") == 2 and "node 1 of 2: 2 rank(s); node 0 is 10.0.0.1:29500" in printed
    assert printed.count("error: ") == 1 and "relora.r: " in printed
    recipe, *overrides = (checkout / "called").read_text().splitlines()[-3:]
    assert (recipe, overrides) == (TASK["envs"]["RECIPE"], ["resume=auto", TASK["envs"]["OVERRIDES"]])
    assert TASK["envs"]["OVERRIDES"].startswith("checkpoint.every=")
    assert (checkout / "runs").resolve() == bucket / "node_1"
    assert [path.name for path in (bucket / "node_1").iterdir()] == ["machine"]  # no empty folder
