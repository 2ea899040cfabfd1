"""The public names: each can be imported, says what it takes and raises, and stands in the API reference."""

import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import relora_ds

REFERENCE = Path(__file__).parents[1] / "docs" / "reference" / "api.md"
NAMES = [name for name in relora_ds.__all__ if name != "__version__"]


@pytest.mark.parametrize("name", NAMES)
def test_it_is_documented(name):
    public = getattr(relora_ds, name)
    docstring = inspect.getdoc(public)
    assert docstring and docstring == inspect.cleandoc(public.__doc__), "a docstring of its own"
    if dataclasses.is_dataclass(public):
        assert inspect.signature(public).parameters
        return  # its fields have their explanations with them
    if inspect.isclass(public) and "__init__" not in vars(public):
        return  # made by a function
    parameters = [one for one in inspect.signature(public).parameters if one not in ("self", "args", "kwargs")]
    assert re.search(r"^Args:", docstring, re.M), "Args:"
    assert re.search(r"^Raises:", docstring, re.M), "Raises:"
    arguments = docstring[docstring.index("Args:") :]
    assert not [one for one in parameters if not re.search(rf"\b{one}\b", arguments)]


@pytest.mark.parametrize("name", NAMES)
def test_it_stands_in_the_reference(name):
    assert re.search(rf"^## `?{name}`?$", REFERENCE.read_text(encoding="utf-8"), re.M)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'relora_ds' has no attribute 'ReLoraConfig'"):
        _ = relora_ds.ReLoraConfig
    assert set(NAMES) <= set(dir(relora_ds))
