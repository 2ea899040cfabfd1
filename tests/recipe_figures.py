"""The figures of the shipped recipes, computed: calendar, tokens and parameters.

`tests/config/test_recipes.py` compares them with what the recipes' headers and docs/reference/recipes.md say. After a
change of a recipe, or with a new one (whose header then needs a line `# Figures:`), this writes the new figures into
both:

    python -m tests.recipe_figures
"""

import re
import textwrap
from dataclasses import dataclass
from functools import cache

from transformers import LlamaConfig, PretrainedConfig

from relora_ds.config import PACKAGE_DIR, Recipe, load_recipe, recipe_names
from relora_ds.lowrank.schedule import scheduled_restarts
from relora_ds.lowrank.wrap import count_parameters
from relora_ds.methods import method_of
from relora_ds.models.build import build_config, meta_model

DOCUMENT = PACKAGE_DIR.parent / "docs" / "reference" / "recipes.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"

# What the recipes take from a hub, which no test may need: vocabularies in pieces (T5's 32,000 and 100 extra ids), and
# the shape of one network.
VOCABULARIES = {"t5-base": 32_100, "HuggingFaceTB/SmolLM2-135M": 49_152}
NETWORKS = {
    "HuggingFaceTB/SmolLM2-135M": LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49_152,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
}


@dataclass(frozen=True)
class Figures:
    """restarts: the run's steps after which one takes place. trainable, total: parameters of the recipe's method."""

    method: str
    steps: int
    tokens_per_step: int
    tokens: int
    warm_start: int
    restarts: list[int]
    trainable: int
    total: int

    def sentence(self) -> str:
        warm = f"a warm start of {self.warm_start:,}" if self.warm_start else "no warm start"
        after = " and ".join(f"{step:,}" for step in self.restarts[-2:])
        after = ", ".join([*(f"{step:,}" for step in self.restarts[:-2]), after])
        restarts = f"restarts after {after}" if self.restarts else "no restart"
        if len(self.restarts) > 12:
            restarts = f"{len(self.restarts):,} restarts, the first after {self.restarts[0]:,}"
        return (
            f"Figures: {self.steps:,} steps of {self.tokens_per_step:,} tokens, {self.tokens:,} in all; {warm}, "
            f"{restarts}; {self.trainable:,} of {self.total:,} parameters train."
        )


def network(recipe: Recipe) -> PretrainedConfig:
    """The configuration of the recipe's full network, with the vocabulary of its tokenizer."""
    if recipe.model.name_or_path:
        return NETWORKS[recipe.model.name_or_path]
    return build_config(recipe.model, recipe.data.vocab_size, recipe.data.seq_len)


@cache
def figures(name: str) -> Figures:
    """The figures of the shipped recipe `name`."""
    recipe = load_recipe(name, check_files=False)
    method = method_of(recipe)
    warm = method.warm_start_steps
    restarts = (
        [warm + t for t in scheduled_restarts(method.low_rank_steps, recipe.relora.restart_every)]
        if method.num_restarts
        else []
    )
    trainable, total = count_parameters(method_of(recipe).prepare(meta_model(network(recipe))))
    return Figures(
        recipe.method,
        recipe.total_steps,
        recipe.tokens_per_step,
        recipe.total_steps * recipe.tokens_per_step,
        warm,
        restarts,
        trainable,
        total,
    )


def header(name: str) -> str:
    """The recipe's comment above its first key, as one line of text."""
    lines = (PACKAGE_DIR / "recipes" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    comment = lines[: next(i for i, line in enumerate(lines) if not line.startswith("#"))]
    return " ".join(" ".join(line.lstrip("#") for line in comment).split())


def table() -> str:
    """The table of docs/reference/recipes.md."""
    rows = [
        "| recipe | method | steps | tokens | warm start | restarts after step | trains | of |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in sorted(recipe_names(), key=_order):
        f = figures(name)
        restarts = ", ".join(f"{step:,}" for step in f.restarts) or "—"
        if len(f.restarts) > 3:
            restarts = f"{f.restarts[0]:,}, {f.restarts[1]:,} … {f.restarts[-1]:,} ({len(f.restarts)})"
        cells = [
            f"`{name}`",
            f"`{f.method}`",
            f"{f.steps:,}",
            _short(f.tokens),
            _count(f.warm_start),
            restarts,
            _short(f.trainable),
            _short(f.total),
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _order(name: str) -> tuple:
    """The demos, then the networks by size; continued pre-training last."""
    size = re.search(r"_(\d+)(m|b)_", name)
    return name == "continued", int(size[1]) * (1000 if size[2] == "b" else 1) if size else 0, "2026" in name, name


def _count(number: int) -> str:
    return f"{number:,}" if number else "—"


def _short(number: int) -> str:
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.2f}{letter}"
    return str(number)


def _write() -> None:
    for name in recipe_names():
        path = PACKAGE_DIR / "recipes" / f"{name}.yaml"
        sentence = textwrap.fill(figures(name).sentence(), 119, initial_indent="# ", subsequent_indent="# ")
        text = path.read_text(encoding="utf-8")
        path.write_text(
            re.sub(r"^# Figures:(.|\n#(?!\n))*$", sentence, text, count=1, flags=re.MULTILINE), encoding="utf-8"
        )
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}", encoding="utf-8")


if __name__ == "__main__":
    _write()
