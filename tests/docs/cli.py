"""The command line in Markdown, from the argument parsers."""

import argparse
import importlib
import re

from relora_ds import train
from relora_ds.__main__ import COMMANDS
from relora_ds.config import recipe_names
from relora_ds.lab.commands.bench import BenchmarkParser


def markdown() -> str:
    """Return a section of every command: its usage and its options."""
    return "\n\n".join(_section(name, parser_of(name)) for name in COMMANDS)


def parser_of(name: str) -> argparse.ArgumentParser:
    """Return the parser of a command."""
    if name == "train":
        return train.parser_of("relora train")
    what, module = COMMANDS[name]
    parser = argparse.ArgumentParser(prog=f"relora {name}", description=what)
    importlib.import_module(module).add_arguments(parser)
    return parser


def _section(name: str, parser: argparse.ArgumentParser) -> str:
    parts = [f"## {name}", COMMANDS[name][0][0].upper() + COMMANDS[name][0][1:] + "."]
    children = [one for one in parser._actions if isinstance(one, argparse._SubParsersAction)]
    parts += [_usage(name, parser), _options(parser)] if not children else []
    for action in children:
        helps = {choice.dest: choice.help for choice in action._choices_actions}
        for child, inner in action.choices.items():
            if isinstance(inner, BenchmarkParser):
                inner.complete()
            parts += [
                f"### {name} {child}",
                _sentence(helps.get(child) or ""),
                _usage(f"{name} {child}", inner),
                _options(inner),
            ]
    return "\n\n".join(part for part in parts if part)


def _usage(name: str, parser: argparse.ArgumentParser) -> str:
    """Return the usage in one line; argparse's own differs between versions of Python."""
    positionals = [_positional(one) for one in parser._actions if not one.option_strings]
    return f"```text\n{' '.join(['relora', name, '[options]', *positionals])}\n```"


def _positional(action: argparse.Action) -> str:
    name = str(action.metavar or action.dest)
    if "..." in name:
        return name
    return {"*": f"[{name} ...]", "+": f"{name} ..."}.get(str(action.nargs), name)


def _options(parser: argparse.ArgumentParser) -> str:
    rows = []
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
            continue
        names = ", ".join(f"`{option}`" for option in action.option_strings) or f"`{action.metavar or action.dest}`"
        rows.append(f"| {names} | {_cell(_help(parser, action))} |")
    return "\n".join(["| argument | meaning |", "|---|---|", *rows]) if rows else ""


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    text = parser._get_formatter()._expand_help(action) if action.help else ""
    choices = ""
    about, _, _ = text.partition("(default")
    if action.choices and not all(re.search(rf"\b{re.escape(str(choice))}\b", about) for choice in action.choices):
        choices = f"one of {', '.join(f'`{choice}`' for choice in action.choices)}"
    default = ""
    if action.default not in (None, False, argparse.SUPPRESS, []) and "default" not in text:
        shown = " ".join(map(str, action.default)) if isinstance(action.default, (list, tuple)) else action.default
        default = f"default: `{shown}`"
    return "; ".join(part for part in (text, choices, default) if part)


def _cell(text: str) -> str:
    text = text.replace(", ".join(recipe_names()), "[list](recipes.md)")
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""
