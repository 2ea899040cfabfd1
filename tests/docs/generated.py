"""Write the parts of the documentation that the code decides: `python -m tests.docs.generated`.

A part stands between `<!-- NAME -->` and `<!-- end of NAME -->`; `PARTS` says which page has it and what makes it.
"""

import inspect
import re
import sys
from collections.abc import Callable

from tests.docs import api, cli, keys, method_costs, method_quality
from tests.docs.pages import DOCS, ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PURPOSES = {  # in the order of the table: those that a run needs first
    "plot": "`relora plot` and the figures of `reproduce`, `spectrum` and `bench`",
    "watch": "the chart of `relora watch`",
    "peft": "baselines of `relora bench`, loading of PEFT exports",
    "quantization": "`relora.frozen_dtype=nf4`, `optim.name=adamw_8bit`",
    "liger": "`model.use_liger_kernel=true`",
    "dedup": "`data.deduplicate`",
    "loggers": "`log.to`, see [Metrics, loggers, hooks](logging.md)",
    "tasks": "`relora eval --tasks` and `eval.tasks`",
    "islands": "`relora islands serve` and the islands that it serves",
    "trainer": "the [Hugging Face Trainer](hf_trainer.md)",
    "docs": "this site",
    "lint": "`ruff`, `codespell` and `mypy` alone",
    "test": "`launch_scripts/test.sh`",
}


def extras() -> str:
    """Return the table of the extras."""
    rows = ["| extra | brings | for |", "|---|---|---|"]
    for name, requirements in sorted(extras_of_setup().items(), key=lambda item: [*PURPOSES].index(item[0])):
        brings = ", ".join(f"`{re.split('[<>=; ]', one)[0]}`" for one in requirements)
        rows.append(f"| `pip install '.[{name}]'` | {brings} | {PURPOSES[name]} |")
    return "\n".join(rows)


def extras_of_setup() -> dict[str, list[str]]:
    """Return the extras of pyproject.toml and what each brings."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["project"]["optional-dependencies"]


def fixed_keys() -> str:
    """Return the list of what must be the same when a run resumes."""
    from relora_ds.training import compatibility

    names = ", ".join(f"`{name}`" for name in compatibility._FIXED)
    return (
        f"- the shape of the network;\n- {names};\n"
        "- the training data or the tokenizer (`data.source`, `data.path`, `data.tokenizer`, `data.max_tokens`, or\n"
        "  the files themselves). The same text gives another tokenizer with another version of sentencepiece;\n"
        "  `data.tokenizer=RUN/checkpoints/tokenizer` is the run's own;\n"
        "- `warm_start_steps`, where the checkpoint is past the old or the new end of the warm start;\n"
        "- `train.steps` or `train.tokens`, where the run would end before the checkpoint."
    )


def moments() -> str:
    """Return what Adam's moments take in both phases of a recipe, in fp32 and in 8 bit."""
    from relora_ds.planning.cost import cost
    from relora_ds.planning.device_memory import peak
    from relora_ds.planning.network import network_of
    from relora_ds.training.phases import phases_of
    from relora_ds.training.preflight import resolve
    from relora_ds.utils.text import human_bytes

    rows: dict[str, list[str]] = {}
    for name in ("adamw", "adamw_8bit"):
        changes = ["deepspeed=zero1", "precision=bf16", f"optim.name={name}"]
        resolved = resolve("llama_350m_relora", changes, 1, to_run=False)
        for phase in phases_of(resolved.recipe):
            items = cost(resolved, phase.method, network_of(resolved.recipe)[0]).items
            held = sum(item.size for item in items if item.what == "Adam's moments")
            rows.setdefault(phase.name, []).extend([human_bytes(held), human_bytes(peak(items))])
    return "\n".join(
        [
            "| `llama_350m_relora`, bf16, ZeRO-1, one GPU | moments, `adamw` | peak | moments, `adamw_8bit` | peak |",
            "|---|---:|---:|---:|---:|",
            *(f"| `{phase}` | {' | '.join(cells)} |" for phase, cells in rows.items()),
        ]
    )


def events() -> str:
    """Return the events of a hook and the first sentence of what each is for."""
    from relora_ds.training.hooks.hook import EVENTS, Hook

    rows = ["| event | called to |", "|---|---|"]
    for name in EVENTS:
        function = getattr(Hook, name)
        arguments = ", ".join(list(inspect.signature(function).parameters)[1:])
        about = " ".join(inspect.getdoc(function).split("\n\n")[0].split())
        rows.append(f"| `{name}({arguments})` | {about[0].lower()}{about[1:]} |")
    return "\n".join(rows)


def arguments() -> str:
    """Return what hooks find in `run` and `step`."""
    from relora_ds.training.state import RunState
    from relora_ds.training.step import Step

    lines = []
    for name, kind in (("run", RunState), ("step", Step)):
        entries = api.entries(kind, "Attributes")
        entries |= {key: inspect.getdoc(value) for key, value in vars(kind).items() if isinstance(value, property)}
        lines += [f"| `{name}` | |", "|---|---|"]
        lines += [
            f"| {', '.join(f'`{one}`' for one in key.split(', '))} | {about[0].lower()}{about[1:]} |"
            for key, about in entries.items()
        ]
        lines.append("")
    return "\n".join(lines[:-1])


# (page, name of the part) -> what makes it
PARTS: dict[tuple[str, str], Callable[[], str]] = {
    ("guides/install.md", "extras"): extras,
    ("guides/logging.md", "events"): events,
    ("guides/logging.md", "arguments"): arguments,
    ("guides/memory.md", "moments"): moments,
    ("guides/methods.md", "costs"): method_costs.markdown,
    ("guides/methods.md", "quality"): method_quality.markdown,
    ("guides/resume.md", "fixed keys"): fixed_keys,
    ("reference/recipe.md", "keys"): keys.markdown,
    ("reference/cli.md", "commands"): cli.markdown,
    ("reference/api.md", "names"): api.markdown,
}


def filled(page: str) -> str:
    """Return the text of docs/PAGE with every part of it made anew."""
    text = (DOCS / page).read_text(encoding="utf-8")
    for (where, name), make in PARTS.items():
        if where == page:
            begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
            before, rest = text.split(begin)
            text = f"{before}{begin}\n{make()}\n\n{end}{rest.split(end)[1]}"
    return text


if __name__ == "__main__":
    for page in dict.fromkeys(page for page, _ in PARTS):
        (DOCS / page).write_text(filled(page), encoding="utf-8")
