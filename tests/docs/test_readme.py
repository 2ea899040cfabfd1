"""The README is short, shows one picture, and leads somewhere."""

import re

import numpy as np
import pytest

from tests.docs import picture
from tests.docs.pages import ROOT, anchors

README = ROOT / "README.md"
TEXT = README.read_text(encoding="utf-8")


def test_it_is_read_in_a_minute():
    assert len(TEXT.encode()) <= 10_000
    assert len(re.findall(r"!\[", TEXT)) == 1


def test_the_api_comes_before_the_commands():
    assert TEXT.index("relora_ds.initialize(") < TEXT.index("launch_scripts/quickstart.sh")


def test_links_lead_somewhere():
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert len(links) > 20
    for link in links:
        file, _, anchor = link.partition("#")
        if not link.startswith("https://"):
            assert (ROOT / file).exists(), link
            assert not anchor or anchor in anchors(ROOT / file if file else README), link


def test_the_tree_names_what_there_is():
    """Every folder of the checkout and every room of relora_ds has a line, and every line a folder."""
    tree = TEXT[TEXT.index("```text\nrelora_ds/") : TEXT.index("train.py  ")]
    inside = {name for line in re.findall(r"^  (\S.*?)   ", tree, re.MULTILINE) for name in line.split()}
    outside = set(re.findall(r"^(\w+/)", tree, re.MULTILINE))
    assert inside == {f"{path.parent.name}/" for path in (ROOT / "relora_ds").glob("*/__init__.py")} | {"recipes/"}
    made = {"runs", "plots", "site", "build", "dist"}  # by commands, and ignored by git
    found = {path.name for path in ROOT.iterdir() if path.is_dir() and not re.match(r"\.|.*\.egg-info", path.name)}
    assert outside == {f"{name}/" for name in found - made}


def test_the_picture_of_the_first_page_is_the_run_of_its_recipe():
    run, index = picture.run_of(picture.RECIPE), (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    assert f"`{picture.RECIPE}`" in index and picture.PICTURE.is_file()
    assert (run.warm_start, run.restarts, run.ranks) == (5000, [10_000, 15_000], [128, 256, 384])
    assert [round(number) for number in run.trainable] == [368, 126]
    assert np.flatnonzero(run.lr == 0).tolist() == [0, 5000, 10_000, 15_000]
    assert run.lr.max() == pytest.approx(1e-3)
