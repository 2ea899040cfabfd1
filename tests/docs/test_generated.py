"""What the code decides stands in the documentation as the code says it."""

import re

import pytest

import relora_ds
from tests.docs import api, generated, keys
from tests.docs.pages import DOCS


@pytest.mark.parametrize("page", sorted({page for page, _ in generated.PARTS}))
def test_the_generated_parts_are_those_of_the_code(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    assert generated.filled(page) == text, f"docs/{page} is stale: python -m tests.docs.generated"


def test_every_argument_has_a_meaning():
    """A cell with a default alone does not say what it is the default of."""
    text = (DOCS / "reference/cli.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if re.search(r"\| (\(default|one of|default:|\|$)", line)] == []


def test_an_argument_that_may_be_left_out_or_repeated_is_shown_so():
    text = (DOCS / "reference/cli.md").read_text(encoding="utf-8")
    for usage in (
        "doctor [options] [section.key=value ...]",
        "plot [options] RUN ...",
        "export [options] RUN_OR_CHECKPOINT DIR",
    ):
        assert f"\nrelora {usage}\n" in text, usage


def test_methods_in_the_python_api_are_those_that_users_call():
    """Not the steps of an update rule, which engines call."""
    shown = re.findall(r"^### (\w+)\.(\w+)$", (DOCS / "reference/api.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert {("ReLoRAEngine", "step"), ("Islands", "close"), ("Hook", "on_step")} <= {*shown}
    assert not {kind for kind, _ in shown} & {"Fira", "Apollo", "Scale", "Muon", "SST"}
    for kind, names in api.CALLED_FOR_THE_USER.items():
        assert names <= vars(getattr(relora_ds, kind)).keys(), "it hides what is there"


def test_every_section_of_keys_leads_to_the_page_that_explains_it():
    text = (DOCS / "reference/recipe.md").read_text(encoding="utf-8")
    sections = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert len(sections) == len(keys.EXPLAINED)
    assert [one.partition("\n")[0] for one in sections if not re.search(r"See \[", one)] == []


def test_every_key_has_an_entry():
    """A new key is a promise to users: it needs its line on the page, and this test a reason to change."""
    text = (DOCS / "reference/recipe.md").read_text(encoding="utf-8")
    assert [key for key in keys.names() if f"`{key}`" not in text] == []
