"""What the code decides stands in the documentation as the code says it."""

import pytest

from tests.docs import generated, keys
from tests.docs.pages import DOCS


@pytest.mark.parametrize("page", sorted({page for page, _ in generated.PARTS}))
def test_the_generated_parts_are_those_of_the_code(page):
    text = (DOCS / page).read_text(encoding="utf-8")
    assert generated.filled(page) == text, f"docs/{page} is stale: python -m tests.docs.generated"


def test_every_key_has_an_entry():
    """A new key is a promise to users: it needs its line on the page, and this test a reason to change."""
    text = (DOCS / "reference/recipe.md").read_text(encoding="utf-8")
    assert [key for key in keys.names() if f"`{key}`" not in text] == []
