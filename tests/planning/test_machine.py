"""Looking at a machine: versions against what pyproject.toml wants, and things that are missing."""

import importlib.metadata
import sys

import pytest

from relora_ds.planning import machine


def test_this_machine_can_train():
    found = machine.examine()
    assert found.essential == []
    facts = {(section, name): value for section, name, value in found.facts}
    assert facts["software", "torch"] == importlib.metadata.version("torch")
    assert facts["backends", "gloo"] == "available"


@pytest.mark.parametrize("installed", [True, False])
def test_requirements_are_those_of_the_project(monkeypatch, installed):
    def requires(name):
        if installed:
            return [
                "deepspeed<0.20,>=0.19.8",
                "transformers>=5",
                "peft; extra == 'peft'",
                "tomli; python_version < '3'",
            ]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    found = machine.requirements()
    assert set(found["deepspeed"].split(",")) == {">=0.19.8", "<0.20"} and ">=5" in found["transformers"]
    assert "peft" not in found and ("tomli" in found) == (not installed and sys.version_info < (3, 11))


@pytest.mark.parametrize(
    "version, wanted, problem", [("0.19.8", ">=0.19.8,<0.20", None), (None, ">=0.19.8", "not installed")]
)
def test_versions(version, wanted, problem):
    found = machine._version_problem("deepspeed", version, wanted)
    assert found is None if problem is None else problem in found


def test_an_unsupported_version_is_essential(monkeypatch):
    monkeypatch.setattr(machine, "requirements", lambda: {"deepspeed": ">=99", "no_such_package": ">=1"})
    found = machine.Findings()
    machine._software(found)
    assert len(found.essential) == 2
    assert 'pip install "deepspeed>=99"' in found.essential[0] and "not installed" in found.essential[1]


def test_a_part_that_breaks_is_a_finding(monkeypatch):
    def broken(found):
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(machine, "_devices", broken)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = machine.examine()
    assert any("devices" in problem and "libcudart" in problem for problem in found.others)
    assert any(section == "backends" for section, _, _ in found.facts)


def test_an_unreachable_hub_is_no_essential_problem(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    found = machine.Findings()
    machine._hub(found)
    assert not found.essential and "cannot be reached" in found.others[0]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = machine.Findings()
    machine._hub(found)
    assert not found.others and "HF_HUB_OFFLINE" in found.facts[0][2]
