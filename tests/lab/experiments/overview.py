"""What a reader of the README asks of every row of a suite: how well it learned, and what it costs."""

import math
import statistics

from relora_ds.config import load_recipe
from relora_ds.lab.bench.environment import rows_as_markdown
from relora_ds.lab.experiments import suite_report
from relora_ds.lab.experiments.suite_report import Measured
from relora_ds.planning.cost import cost
from relora_ds.planning.device_memory import DEVICE, KEPT, total
from relora_ds.planning.network import network_of
from relora_ds.training.phases import phases_of
from relora_ds.training.preflight import resolve
from relora_ds.utils.text import human_bytes

# Of the costs, which are planned; what was trained is one rank. They depend neither on the batch nor on the corpus: its
# files need not be there.
RANKS = 8
ON_RANKS = ("deepspeed=zero1", "train.micro_batch_size=1", f"train.batch_sequences={RANKS}")
NO_FILES = ("data.source=pydocs", "data.path=null", "data.validation=null")
HEADS = ["", "seeds", "validation loss", "perplexity against full rank", "full-rank steps"]
COSTS = ["sent by a rank in a step", "kept on a rank", "tokens/s"]


def table(rows: list[Measured], reference: str) -> str:
    """Return a line for each row; costs are of its last phase, restarts and residual updates spread over the steps.

    Args:
        reference: the name of the row that the others are compared with.
    """
    (full,) = [row for row in rows if row.row.name == reference]
    return rows_as_markdown([[*HEADS, *COSTS], *([*_learned(row, full), *_costs(row)] for row in rows)])


def per_cent(row: Measured, full: Measured) -> list[float]:
    """Return how much higher its perplexity is than full rank's, of each seed that both have."""
    return [100 * (math.exp(difference) - 1) for difference in row.differences(full)]


def _learned(row: Measured, full: Measured) -> list[str]:
    recipe = load_recipe(row.row.recipe, row.row.overrides, check_files=False)
    share = recipe.warm_start_steps / recipe.train.steps
    return [
        row.row.name,
        str(len(row.losses)),
        suite_report.spread(row.losses),
        "reference" if row is full else _spread(per_cent(row, full)),
        "all" if recipe.method == "full" else f"{100 * share:.0f} %" if share else "none",
    ]


def _spread(values: list[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.mean(values):+.1f} %"
    return mean if len(values) == 1 else f"{mean} ({min(values):+.1f} to {max(values):+.1f})"


def _costs(row: Measured) -> list[str]:
    resolved = resolve(row.row.recipe, [*row.row.overrides, *NO_FILES, *ON_RANKS], RANKS, to_run=False)
    phase = phases_of(resolved.recipe)[-1]
    found = cost(resolved, phase.method, network_of(resolved.recipe)[0])
    assert found.step is not None, "the batch is a multiple of the ranks"
    sent, relora = found.step[1], phase.method.relora
    if found.restart is not None:
        sent += found.restart[1] / relora.restart_every
    if found.residual is not None:
        sent += found.residual[1] / relora.residual_every
    speeds = [one["tokens_per_s"][resolved.recipe.method] for one in row.results]
    return [
        human_bytes(math.ceil(sent)),
        human_bytes(total(found.items, DEVICE, KEPT)),
        f"{statistics.median(speeds):,.0f}",
    ]
