"""CONTRIBUTING.md and the hooks name what there is."""

import re

import pytest
import yaml

from tests.docs.generated import extras_of_setup
from tests.docs.pages import ROOT, anchors

TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_links_files_and_modules_exist():
    for target in re.findall(r"\]\(([^)]+)\)", TEXT):
        file, _, anchor = target.partition("#")
        assert (ROOT / file).is_file(), target
        assert not anchor or anchor in anchors(ROOT / file), target
    for path in re.findall(r"`((?:relora_ds|tests|launch_scripts)/[\w/.]+)`", TEXT):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m (tests[\w.]+)", TEXT):
        assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), module


@pytest.mark.parametrize("hook", ["ruff", "ruff-format", "codespell", "mypy"])
def test_the_test_extra_brings_what_a_hook_runs(hook):
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    (entry,) = (one["entry"] for one in repository["hooks"] if one["id"] == hook)
    brought = {re.split("[<>=]", requirement)[0] for requirement in extras_of_setup()["test"]}
    assert entry.split()[0] in brought
