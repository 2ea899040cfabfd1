"""Claims of docs/results/training_mini.md, by heading. See `tests/docs/prose.py`."""

from relora_ds.config import load_recipe, method_of
from relora_ds.planning.network import network_of, shapes_of
from tests.docs.phrases import fraction, listed, with_each_seed
from tests.lab.experiments import overview, results

RECIPE = load_recipe("mini_full", check_files=False)
FULL, CHAIN, LORA, RELORA = "full rank", "GaLore, residual", "LoRA, warm start", "ReLoRA"
RAMPS = (20, 100)  # steps


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


def equal_tokens() -> list[str]:
    rows = {row.row.name: row for row in results.measured("mini", "main")[2]}
    full, chain = rows[FULL], rows[CHAIN]
    lower = [-gap for gap in overview.per_cent(chain, full)]
    noise = {name: max(row.losses) - min(row.losses) for name, row in ((FULL, full), (CHAIN, chain))}
    (tokens,) = {one["val_tokens"] for row in rows.values() for one in row.results}
    every = load_recipe("mini_galore", check_files=False).relora.residual_every
    return [
        f"The one-sided chain ends {listed(sorted(lower), 1)} % below full rank in perplexity, {with_each_seed(lower)}",
        f"Its two seeds differ by {noise[CHAIN]:.3f} nats, full rank's by {noise[FULL]:.3f}",
        f"Every {every} steps the chain applies",
        f"These runs are scored on {tokens:,} validation tokens",
        f"costs are those of {overview.RANKS} ranks at ZeRO stage 1",
    ]


def learning_rates() -> list[str]:
    rows = {row.row.name: row for row in results.measured("mini", "lr")[2]}
    (tokens,) = {one["tokens"] for row in rows.values() for one in row.results}
    long, short = max(RAMPS), min(RAMPS)
    shorter = {
        group: rows[f"{group}, ramp {short}"].mean - rows[f"{group}, ramp {long}"].mean for group in (FULL, CHAIN)
    }
    best = {group: min(row.mean for row in rows.values() if row.row.group == group) for group in (FULL, LORA, RELORA)}
    lora, relora = (best[FULL] - best[group] for group in (LORA, RELORA))
    flat = 0.001
    for group, one, other in ((FULL, 0.001, 0.002), (CHAIN, 0.002, 0.004)):
        assert abs(rows[f"{group}, learning rate {one}"].mean - rows[f"{group}, learning rate {other}"].mean) < flat
    return [
        f"Runs of {tokens // RECIPE.tokens_per_step} steps, {tokens / 1e6:.1f}M tokens",
        f"A ramp has {long} steps",
        f"rates of residual updates were compared with one of {short}",
        f"With one of {short} steps full rank ends {shorter[FULL]:.3f} nats higher, and the chain {shorter[CHAIN]:.3f}",
        f"the same at 0.001 and at 0.002 to {flat} nats, and the chain's at 0.002 and at 0.004",
        f"end below full rank, by {lora:.3f} and {relora:.3f} nats",
    ]


CLAIMS = {"Training results: scale mini": network, "Equal tokens": equal_tokens, "Learning rates": learning_rates}
FROM_ELSEWHERE: dict[str, dict[str, str]] = {}
