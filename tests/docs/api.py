"""The public Python names in Markdown, from signatures and docstrings."""

import dataclasses
import inspect
import re
import textwrap
import typing

import relora_ds
from tests.docs.keys import explanations

# Methods that the package calls of what a user makes; of engines, DeepSpeed.
CALLED_FOR_THE_USER = {
    "ReLoRAConfig": {"problems", "conflicts"},
    "Islands": {"problems", "join", "enter", "decided", "note_checkpoint"},
    "ReLoRAEngine": {"clip_fp32_gradients"},
}


def markdown() -> str:
    """Return a section of every public name."""
    return "\n\n".join(_section(name, getattr(relora_ds, name)) for name in relora_ds.__all__ if name != "__version__")


def _section(name: str, thing) -> str:
    about, raises, errors = _text(inspect.getdoc(thing) or "").partition("**Raises**")
    if dataclasses.is_dataclass(thing) and (texts := explanations(thing)):
        fields = [f"- `{field}`: {' '.join(text.split())}" for field, text in texts.items()]
        about = "\n".join([about.rstrip(), "", "**Args**", "", *fields, "", ""]).replace("null =", "None =")
    parts = [f"## {name}", _block("python", _signature(name, thing)), about + raises + errors]
    if inspect.isclass(thing):
        for method, function in _methods_for_users(thing).items():
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


def _methods_for_users(kind: type) -> dict:
    """Return the documented public methods that a class defines for those who use it.

    What a base class of the package declares, such as the steps of an update rule, is for the package to call, unless
    the base is public itself.
    """
    bases = [base for base in kind.__mro__[1:] if base.__module__.startswith("relora_ds.")]
    declared = {name for base in bases if getattr(relora_ds, base.__name__, None) is not base for name in vars(base)}
    hidden = declared | CALLED_FOR_THE_USER.get(kind.__name__, set())
    return {
        name: value
        for name, value in vars(kind).items()
        if not name.startswith("_") and name not in hidden and inspect.isfunction(value) and value.__doc__
    }


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
