"""Claims of docs/results/training_mini.md, by heading. See `tests/docs/prose.py`."""

from relora_ds.config import load_recipe, method_of
from relora_ds.planning.network import network_of, shapes_of
from tests.docs import tiny_runs
from tests.docs.phrases import fraction
from tests.lab.experiments import results

RECIPE = load_recipe("mini_full", check_files=False)


def network() -> list[str]:
    config, _ = network_of(RECIPE)
    weights = shapes_of(method_of(RECIPE), config).num_trainable
    tokens = RECIPE.total_steps * RECIPE.tokens_per_step
    r = load_recipe("mini_relora", check_files=False).relora.r
    return [
        f"{weights / 1e6:.1f}M parameters, hidden size {config.hidden_size}, {config.num_hidden_layers} layers, a "
        f"vocabulary of {config.vocab_size:,}",
        f"{RECIPE.total_steps:,} steps of {RECIPE.tokens_per_step:,} tokens, {tokens / 1e6:.1f}M in all",
        f"r is {r}, {fraction(r / config.hidden_size)} of the width",
    ]


def learning_rates() -> list[str]:
    rows = results.measured("mini", "lr")[2]
    (tokens,) = {one["tokens"] for row in rows for one in row.results}
    best = {
        group: min(row.mean for row in rows if row.row.group == group) for group in ("full rank", "LoRA, warm start")
    }
    assert best["LoRA, warm start"] < best["full rank"] and tiny_runs.lead("main", "full rank", tiny_runs.LORA) > 0
    return [f"Runs of {tokens // RECIPE.tokens_per_step} steps, {tokens / 1e6:.1f}M tokens"]


CLAIMS = {"Training results: scale mini": network, "Learning rates": learning_rates}
FROM_ELSEWHERE: dict[str, dict[str, str]] = {}
