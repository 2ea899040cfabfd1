"""single_node.sh and quickstart.sh: what they print, the exit code, and nothing left behind."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from relora_ds.checkpoint import store
from relora_ds.training.requeue import FIRST_START
from relora_ds.zero.launchers import HOST_NAME, hosts_in
from tests.launch.scripts import SCRIPTS, run, start


def processes_with(word: str) -> dict[int, str]:
    """The command lines of the living processes that contain `word`, by process id."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            found[int(path.parent.name)] = path.read_bytes().replace(b"\0", b" ").decode()
    return {pid: command for pid, command in found.items() if word in command and pid != os.getpid()}


@pytest.mark.parametrize("script", [("single_node.sh", "tiny"), ("quickstart.sh", "data.source=pydocs")])
def test_a_bad_recipe_is_said_once_and_ends_with_2(script, tmp_path):
    name, *arguments = script
    code, printed = run("bash", SCRIPTS / name, *arguments, "relora.r=0", "train.nonsense=1", cwd=tmp_path)
    assert code == 2, printed
    assert printed.count("relora.r: ") == 1 and printed.count("train.nonsense: ") == 1 and "Traceback" not in printed
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_signal_to_the_script_ends_every_rank_with_its_state_saved(tmp_path):
    script = start(
        "bash",
        SCRIPTS / "single_node.sh",
        "tiny",
        "train.steps=100000",
        f"run_dir={tmp_path / 'run'}",
        "checkpoint.every=null",
        cwd=tmp_path,
    )
    try:
        for line in script.stdout:
            if line.startswith("step     12/"):
                break
        commands = processes_with(str(tmp_path)).values()
        assert sum("-u" in command and "start_ranks" not in command for command in commands) == 2
        os.kill(script.pid, signal.SIGTERM)
        assert script.wait(timeout=180) == 75
        assert processes_with(str(tmp_path)) == {}
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        assert (status["state"], status["exit_code"]) == ("preempted", 75)
        (saved,) = store.directories(tmp_path / "run")
        assert saved.name == f"step_{status['step']:08d}" and store.verify(saved) == []
    finally:
        script.stdout.close()
        for process in processes_with(str(tmp_path)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


def test_the_help_says_how_to_call(tmp_path):
    for name in ("quickstart.sh", "single_node.sh", "multi_node.sh"):
        code, printed = run("bash", SCRIPTS / name, "--help", cwd=tmp_path)
        assert code == 0 and f"bash launch_scripts/{name}" in printed and "section.key=value" in printed
        assert "set -euo" not in printed and "shellcheck" not in printed


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["multi_node.sh", "tiny"], "--hostfile FILE is needed"),
        (["multi_node.sh", "--hostfile", "absent", "tiny"], "there is no file absent"),
        (["multi_node.sh", "--hostfile", "bad", "tiny"], "'worker-1 ' is not NAME slots=RANKS"),
        (["multi_node.sh", "--hostfile", "empty", "tiny"], "it names no machine"),
        (["multi_node.sh", "--hostfile", "good", "--no_ssh", "tiny"], "'' is none of 0 to 1"),
        (["multi_node.sh", "--hostfile", "good", "--no_ssh", "--node_rank", "2"], "'2' is none of 0 to 1"),
        (["multi_node.sh", "--hostfile", "good", "--node_rank", "1"], "--node_rank goes with --no_ssh"),
        (["multi_node.sh", "--hostfile"], "--hostfile needs a value"),
        (["multi_node.sh", "--hostfile", "folder", "tiny"], "there is no file folder"),
        (
            ["multi_node.sh", "--hostfile", "good", "--master_addr", "-oProxyCommand=x"],
            "--master_addr: '-oProxyCommand=x'",
        ),
        (["multi_node.sh", "--hostfile", "good", "--master_port", "70000"], "--master_port: '70000' is not a port"),
        (["multi_node.sh", "--hosts", "good"], "unknown option --hosts"),
        (["multi_node.sh", "--nodes", "0", "--no_ssh"], "--nodes: '0' is not a number of machines"),
        (["multi_node.sh", "--nodes", "2", "--hostfile", "good"], "--nodes goes without --hostfile"),
        (["multi_node.sh", "--nodes", "2", "--master_addr", "a"], "--nodes goes with --no_ssh and --master_addr"),
        (["multi_node.sh", "--nodes", "2", "--no_ssh"], "--nodes goes with --no_ssh and --master_addr"),
        (
            ["multi_node.sh", "--nodes", "2", "--no_ssh", "--master_addr", "a", "--node_rank", "2"],
            "'2' is none of 0 to 1, the machines\n",
        ),
        (["multi_node.sh", "--hostfile", "good", "tiny", "relora"], "relora: after the recipe, only section.key=value"),
        (["single_node.sh", "tiny", "--num_gpus"], "--num_gpus: after the recipe, only section.key=value"),
    ],
)
def test_wrong_arguments(arguments, problem, tmp_path):
    (tmp_path / "good").write_text("# two machines\n\nworker-0 slots=1\nworker-1 slots=2 # with more\n")
    (tmp_path / "bad").write_text("worker-0 slots=1\nworker-1\n")
    (tmp_path / "empty").write_text("# worker-0 slots=1\n")
    (tmp_path / "folder").mkdir()
    code, printed = run("bash", SCRIPTS / arguments[0], *arguments[1:], cwd=tmp_path)
    assert code == 1 and printed.startswith("error: ") and problem in printed and printed.count("\n") == 1


HOSTS = [
    "-oProxyCommand=touch${IFS}ran",
    "-w",
    "--",
    "$(touch${IFS}ran)",
    "`touch${IFS}ran`",
    "a;b",
    "a|b",
    "a&b",
    "w[0-9]",
    "a,b",
    "a*",
    "user@-x",
    "a'b",
    'a"b',
    "a\\b",
    "../x",
    "ä",
]


def test_host_names_that_would_be_options_or_commands(tmp_path):
    """All are refused by name, by the script and by the commands."""
    for host in HOSTS:
        (tmp_path / "hosts").write_text(f"worker-0 slots=1\n{host} slots=1\n")
        with pytest.raises(ValueError, match="not a host name or an address") as error:
            hosts_in(tmp_path / "hosts")
        assert repr(host) in str(error.value)
    shell = f"cd {tmp_path}; for name in hosts_*; do bash {SCRIPTS}/multi_node.sh --hostfile $name tiny; done"
    for number, host in enumerate(HOSTS):
        (tmp_path / f"hosts_{number:02}").write_text(f"worker-0 slots=1\n{host} slots=1\n")
    _, printed = run("bash", "-c", shell, cwd=tmp_path)
    lines = printed.splitlines()
    assert len(lines) == len(HOSTS)
    for host, line in zip(HOSTS, lines, strict=True):
        assert line.startswith("error: hosts_") and f"'{host}' is not a host name or an address" in line
    assert not (tmp_path / "ran").exists()


def test_multi_node_knows_what_the_package_knows():
    """The shell script repeats the pattern of host names and the variables of restarted jobs."""
    script = (SCRIPTS / "multi_node.sh").read_text(encoding="utf-8")
    assert f"host_name='^{HOST_NAME.pattern}$'" in script
    assert f"restarts='{'|'.join(FIRST_START)}'" in script


def test_host_names_that_are_fine(tmp_path):
    hosts = ["worker-0", "10.0.0.1", "me@gpu01.example.org", "fe80::1%eth0", "::1", "GPU_2"]
    (tmp_path / "hosts").write_text("\n # machines\n" + "".join(f"{host} slots=2 # fine\n" for host in hosts))
    assert hosts_in(tmp_path / "hosts") == hosts
    code, printed = run(
        "bash", SCRIPTS / "multi_node.sh", "--no_ssh", "--node_rank", "9", "--hostfile", "hosts", cwd=tmp_path
    )
    assert code == 1 and "'9' is none of 0 to 5" in printed  # all of them were read
    (tmp_path / "hosts").write_text("a slots=1\nb slots=1\na slots=2\n")
    _, printed = run("bash", SCRIPTS / "multi_node.sh", "--hostfile", "hosts", cwd=tmp_path)
    assert "'a' is named twice" in printed
    with pytest.raises(ValueError, match="'a' is in .* twice"):
        hosts_in(tmp_path / "hosts")
    with pytest.raises(ValueError, match="cannot be read"):
        hosts_in(tmp_path)


@pytest.mark.parametrize(
    ("recorded", "launcher", "node", "code"),
    [
        (0, 0, 0, 0),
        (3, 1, 0, 3),
        (75, 143, 0, 75),
        (2, 0, 0, 2),
        ("null", 0, 0, 1),  # a rank died without a word, and the launcher did not say so
        ("null", 143, 0, 143),
        ("null", 0, 1, 0),  # another node may see an old file
    ],
)
def test_the_exit_code_is_what_the_run_recorded(recorded, launcher, node, code, tmp_path):
    (tmp_path / "status.json").write_text(f'{{"exit_code": {recorded}}}')
    body = (
        f"source {SCRIPTS}/environment.sh; source {SCRIPTS}/launch.sh; PYTHON={sys.executable}; node_rank={node}; "
        f"exit_code {tmp_path} started {launcher}"
    )
    started = tmp_path / "started"
    started.touch()
    for age, expected in ((-60, code), (60, launcher)):  # older than the start: of the run before
        moment = (tmp_path / "status.json").stat().st_mtime + age
        os.utime(started, (moment, moment))
        assert run("bash", "-c", body, cwd=tmp_path) == (0, str(expected))
