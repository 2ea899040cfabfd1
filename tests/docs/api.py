"""The public Python names in Markdown, from signatures and docstrings."""

import dataclasses
import inspect
import re
import textwrap
import typing

import relora_ds
from tests.docs.keys import explanations


def markdown() -> str:
    """Return a section of every public name."""
    return "\n\n".join(_section(name, getattr(relora_ds, name)) for name in relora_ds.__all__ if name != "__version__")


def _section(name: str, thing) -> str:
    about, raises, errors = _text(inspect.getdoc(thing) or "").partition("**Raises**")
    if dataclasses.is_dataclass(thing):
        fields = [f"- `{field}`: {' '.join(text.split())}" for field, text in explanations(thing).items()]
        about += "\n".join(["**Args**", "", *fields, "", ""]).replace("null =", "None =")
    parts = [f"## {name}", _block("python", _signature(name, thing)), about + raises + errors]
    if inspect.isclass(thing):
        for method, function in _own_methods(thing).items():
            parts += [
                f"### {name}.{method}",
                _block("python", _signature(method, function)),
                _text(inspect.getdoc(function)),
            ]
    return "\n\n".join(parts)


def entries(thing, section: str) -> dict[str, str]:
    """Return the entries of a section of a docstring, such as its `Attributes:`."""
    _, _, rest = inspect.getdoc(thing).partition(f"{section}:\n")
    found = re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {5,}.*)*)", rest.split("\n\n")[0], re.MULTILINE)
    return {name: " ".join(about.split()) for name, about in found}


def _own_methods(kind: type) -> dict:
    """Return the documented public methods that the class itself defines."""
    found = {
        name: value for name, value in vars(kind).items() if not name.startswith("_") and inspect.isfunction(value)
    }
    return {name: function for name, function in found.items() if function.__doc__}


def _signature(name: str, thing) -> str:
    try:
        signature = inspect.signature(thing)
    except (TypeError, ValueError):
        return name
    parameters = list(signature.parameters.values())
    if inspect.isclass(thing) and (
        "__init__" not in vars(thing) or any(one.kind is one.VAR_POSITIONAL for one in parameters)
    ):
        base = f"({thing.__base__.__name__})" if thing.__base__ is not object else ""
        return f"class {name}{base}"  # with the arguments of its base
    parameters = [one for one in parameters if one.name != "self"]
    shown = [_short(str(one.replace(annotation=_plain(one.annotation)))) for one in parameters]
    if (first := next((i for i, one in enumerate(parameters) if one.kind is one.KEYWORD_ONLY), None)) is not None:
        shown.insert(first, "*")
    line = f"{name}({', '.join(shown)})"
    if len(line) > 100:
        line = f"{name}(\n" + textwrap.indent(",\n".join(shown), "    ") + ",\n)"
    return line


def _short(parameter: str) -> str:
    """Return a parameter without the modules and quotes of its types; torch's are named as they are imported."""
    parameter = re.sub(r": '([^']*)'", r": \1", parameter)
    parameter = parameter.replace("torch.nn.modules.module.", "torch.nn.")
    return re.sub(r"\b(?:relora_ds(?:\.\w+)*|typing|collections\.abc|pathlib)\.(?=[A-Z])", "", parameter)


def _plain(annotation: object) -> object:
    """Return a type without the rules that a recipe's schema gives it."""
    if isinstance(annotation, dataclasses.InitVar):
        return annotation.type
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


def _text(docstring: str) -> str:
    """Return a docstring in Markdown: the entries of `Args:` and the like as lists."""
    lines, in_section, has_entries = [], False, False
    for line in docstring.splitlines():
        if re.fullmatch(r"(Args|Returns|Raises|Attributes|Args, Returns):", line):
            in_section, has_entries = True, line != "Returns:"
            lines += [f"**{line.removesuffix(':')}**", ""]
        elif not line.strip():
            lines.append("")
        elif not line.startswith(" "):
            in_section = has_entries = False
            lines.append(line)
        elif has_entries and (entry := re.fullmatch(r" {4}(\w[\w, ]*): (.*)", line)):
            lines.append(f"- `{entry[1]}`: {entry[2]}")
        else:
            lines.append(f"  {line.strip()}" if has_entries else line.strip() if in_section else line)
    return "\n".join(lines)


def _block(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
