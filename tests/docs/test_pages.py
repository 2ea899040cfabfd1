"""What docs/ says can be checked: its links, the tests and files that it names, and the measured figures."""

import re

import pytest
import torch

from relora_ds.config import load_recipe, preset_names, recipe_names
from relora_ds.lowrank.formats import DENSE
from tests.docs.pages import DOCS, PAGES, ROOT, anchors, commands, fenced, name_of
from tests.test_architecture import ALLOWED


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_links_files_tests_and_recipes_exist(path):
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        file, _, anchor = target.partition("#")
        if not target.startswith("https://"):
            linked = path.parent / file if file else path
            assert linked.is_file(), target
            assert not anchor or anchor in anchors(linked), target
    for file in re.findall(r"`((?:relora_ds|tests|launch_scripts)/[\w/.]+)`", text):
        assert (ROOT / file).exists(), file
    for file, test in re.findall(r"`(tests/[\w/]+\.py)`,\s+`(test_\w+)`", text):
        assert f"def {test}(" in (ROOT / file).read_text(encoding="utf-8"), test
    for room, module in re.findall(r"`([a-z]+)/(\w+\.py)`", text):
        if (ROOT / "relora_ds" / room).is_dir():
            assert (ROOT / "relora_ds" / room / module).is_file(), f"{room}/{module}"
    for name in re.findall(r"`((?:llama|continued|quickstart|tiny)_\w+)`", text):
        assert name in {*recipe_names(), *preset_names()}, name


def test_the_files_of_each_room_exist():
    text = (DOCS / "concepts/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (.*\.py.*) \|$", text, re.MULTILINE)
    assert len(rows) > 5
    for room, files in rows:
        folder = ROOT / "relora_ds" / room
        assert [name for name in re.findall(r"`(\w+\.py)`", files) if not (folder / name).is_file()] == [], room


def test_the_diagram_of_rooms_is_in_the_order_of_imports():
    """Each room imports only rooms above it; `lab` and its rooms are outside of the product."""
    diagram = (DOCS / "concepts/architecture.md").read_text(encoding="utf-8").split("```")[1]
    product, lab = diagram.split("\nlab ")
    above = []
    for room in re.findall(r"^ *(\w+) {2,}", product, re.MULTILINE):
        assert ALLOWED[room] <= set(above), room
        above.append(room)
    rooms_of_lab = re.findall(r"^  (\w+) ", lab, re.MULTILINE)
    known = {*above, "lab", *(f"lab.{room}" for room in rooms_of_lab), "__init__", "__main__", "lab.commands"}
    assert set(ALLOWED) == known


def test_the_recipe_in_the_document_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("text")
    (recipe,) = fenced(DOCS / "reference/recipe_files.md", "yaml")
    (tmp_path / "my_run.yaml").write_text(recipe)
    lines = [*commands(DOCS / "reference/recipe_files.md"), *commands(DOCS / "reference/recipes.md")]
    assert len(lines) == 3
    for command in lines:
        name, *overrides = command.partition("--config ")[2].split()
        load_recipe(name, overrides)
    mine = load_recipe("my_run.yaml", ["optim.lr=1e-3"])
    assert (mine.relora.r, mine.relora.restart_every, mine.train.tokens) == (256, 5000, 10**10)


def test_rounding_errors_of_a_merge_are_those_of_the_table():
    text = (DOCS / "concepts/restart.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (1e-\d) \| (\d+) % \| (\d+) % \|$", text, re.MULTILINE)
    assert len(rows) == 3
    generator = torch.Generator().manual_seed(0)

    def normal(rms):
        return torch.randn(2 * 10**6, generator=generator, dtype=torch.float64).mul_(rms).float()

    def error(stored, update):
        return 100 * float((stored - before - update).double().norm() / update.double().norm())

    weight = normal(0.02)
    before = DENSE.quantize(weight, torch.bfloat16).float()
    for rms, expected, unchanged in rows:
        update = normal(float(rms))
        merged = DENSE.quantize(before + update, torch.bfloat16).float()
        assert error(merged, update) == pytest.approx(int(expected), abs=0.6)
        assert 100 * float((merged == before).float().mean()) == pytest.approx(int(unchanged), abs=0.6)

    in_place, master, update = before.clone(), weight.clone(), normal(1e-5)
    for _ in range(20):
        in_place = DENSE.quantize(in_place + update, torch.bfloat16).float()
        master += update
    errors = [error(stored, 20 * update) for stored in (in_place, DENSE.quantize(master, torch.bfloat16).float())]
    assert f"still {errors[0]:.0f} % off in place, and {errors[1]:.0f} % with an fp32" in text, errors
