"""`relora --help` answers at once: it imports nothing heavy, and says nothing else."""

import subprocess
import sys

import pytest

import relora_ds
from relora_ds.__main__ import main

HELP = """
import sys
from relora_ds.__main__ import main

try:
    main(sys.argv[1:])
except SystemExit:
    print("HEAVY", sorted({"torch", "transformers", "deepspeed", "numpy"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], *([name, "--help"] for name in ("bench", "check", "train")), ["--version"]], ids=" ".join
)
def test_it_imports_nothing_heavy(arguments):
    done = subprocess.run([sys.executable, "-c", HELP, *arguments], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("HEAVY []\n") and done.stderr == ""


@pytest.mark.parametrize(
    "program, name", [("/usr/bin/relora", "relora"), ("/x/relora_ds/__main__.py", "python -m relora_ds")]
)
def test_it_names_the_command_as_it_was_called(monkeypatch, capsys, program, name):
    monkeypatch.setattr(sys, "argv", [program])
    for command, named in (([], name), (["train"], f"{name} train"), (["check"], f"{name} check")):
        with pytest.raises(SystemExit):
            main([*command, "--help"])
        assert capsys.readouterr().out.startswith(f"usage: {named} [-h]")


def test_it_tells_its_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"relora_ds {relora_ds.__version__}\n"
