"""What was measured, and the table of it."""

import json
import math
import statistics
from pathlib import Path

from relora_ds.lab.bench.environment import rows_as_markdown
from tests.lab.experiments.levers.variants import VARIANTS

FILE = Path(__file__).parents[4] / "docs" / "results" / "levers.jsonl"


def read() -> dict[tuple[str, int], float]:
    """Return validation losses by variant and seed."""
    lines = FILE.read_text(encoding="utf-8").splitlines() if FILE.exists() else []
    return {(line["variant"], line["seed"]): line["val_loss"] for line in map(json.loads, lines)}


def table() -> str:
    """Return the variants that were measured, in Markdown: mean loss over the seeds, and the distance to full rank."""
    losses, rows = read(), [["variant", "seeds", "validation loss", "perplexity", "loss against full rank"]]
    by_variant = {name: {seed: loss for (other, seed), loss in losses.items() if other == name} for name in VARIANTS}
    reference = by_variant["full rank"]
    for name, found in by_variant.items():
        if found:
            mean = statistics.mean(found.values())
            pairs = [loss - reference[seed] for seed, loss in found.items() if seed in reference]
            distance = f"{statistics.mean(pairs):+.4f}" if pairs and name != "full rank" else ""
            rows.append([name, str(len(found)), f"{mean:.4f}", f"{math.exp(mean):.2f}", distance])
    return rows_as_markdown(rows)
