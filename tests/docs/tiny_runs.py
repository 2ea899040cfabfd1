"""What the sentences of docs/results/training.md speak of, read from the runs of the scale tiny.

Rows have the seeds of their suite. Some rows were trained with more of them, which `loss` also reads.
"""

from functools import cache
from statistics import mean, median, stdev

from relora_ds.config import load_recipe
from relora_ds.lab.experiments.runs import Results, Run
from relora_ds.lab.experiments.suite_report import Measured
from tests.lab.experiments import results

RECIPE = load_recipe("tiny_relora")
LORA = "LoRA, warm start"  # a row's name in several suites


@cache
def rows(suite: str) -> dict[str, Measured]:
    return {row.row.name: row for row in results.measured("tiny", suite)[2]}


def row(suite: str, name: str) -> Measured:
    return rows(suite)[name]


def loss(suite: str, name: str, seed: int = 0) -> float:
    found = Results(results.RESULTS / "tiny").read(Run.of(row(suite, name).row, seed))
    assert found is not None, f"{suite}: {name} was not trained with seed {seed}"
    return found["val_loss"]


def spread(suite: str, name: str) -> float:
    """The standard deviation of the losses over the seeds."""
    return stdev(row(suite, name).losses)


def leads(suite: str, name: str, other: str) -> list[float]:
    """By how much the row ends below another one, by seed."""
    return [-gap for gap in row(suite, name).differences(row(suite, other))]


def lead(suite: str, name: str, other: str) -> float:
    return mean(leads(suite, name, other))


def training_lead(suite: str, name: str, other: str, after: int, last: int) -> float:
    """By how much the training loss is below another row's after one step and up to another, over all seeds."""

    def losses(of: Measured) -> list[float]:
        curve = (point for result in of.results for point in result["train_curve"])
        return [loss for tokens, loss in curve if after < tokens / RECIPE.tokens_per_step <= last]

    return mean(losses(row(suite, other))) - mean(losses(row(suite, name)))


def rank(suite: str, name: str) -> str:
    """The rank of the update, the median over the seeds."""
    return f"{median(one['spectrum']['numerical_rank'] for one in row(suite, name).results if one['spectrum']):g}"


def paper(suite: str, name: str, size: str = "130M") -> float:
    """A perplexity that the paper prints."""
    return row(suite, name).row.paper[size]
