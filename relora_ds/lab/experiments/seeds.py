"""The runs of a suite: its rows with their seeds, and further seeds of the rows that turned out best."""

from collections.abc import Sequence

from relora_ds.lab.experiments.runs import Results, Run
from relora_ds.lab.experiments.suites import Row, Suite


def first_runs(suite: Suite, rows: Sequence[Row], overrides: Sequence[str] = (), seeds: int | None = None) -> list[Run]:
    """Return the runs of rows, seed by seed. seeds: of each row; None for the suite's number."""
    return [Run.of(row, seed, overrides) for seed in range(seeds or suite.seeds) for row in rows]


def runs_of_best(
    suite: Suite, rows: Sequence[Row], results: Results, overrides: Sequence[str] = ()
) -> tuple[list[Run], int]:
    """Return the further runs of `rows` that are known so far, and how many will be known when all rows have ended.

    A suite with `seeds_of_best` trains so many seeds of the best row of every sweep's group, and of every row outside
    of sweeps. Which row is best is decided by the suite's first seeds of the whole group.
    """
    more = range(suite.seeds, suite.seeds_of_best or suite.seeds)
    groups = dict.fromkeys((row.axis, row.group) for row in rows if row.axis)
    chosen = [row for row in rows if row.axis is None]
    unknown = 0
    for axis, group in groups:
        swept = [row for row in suite.rows if (row.axis, row.group) == (axis, group)]
        losses = [_loss(suite, row, results, overrides) for row in swept]
        if None in losses:
            unknown += len(more)
        elif (best := swept[losses.index(min(losses))]) in rows:  # type: ignore[type-var]
            chosen.append(best)
    return [Run.of(row, seed, overrides) for seed in more for row in chosen], unknown


def _loss(suite: Suite, row: Row, results: Results, overrides: Sequence[str]) -> float | None:
    """Return the mean validation loss over the suite's first seeds, or None where one of them has not ended."""
    found = [results.read(run) for run in first_runs(suite, [row], overrides)]
    return None if None in found else sum(one["val_loss"] for one in found if one) / len(found)
