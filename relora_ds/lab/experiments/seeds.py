"""The runs of a suite: its rows with their seeds, and further seeds of the rows that turned out best."""

from collections.abc import Sequence

from relora_ds.lab.experiments.runs import Results, Run
from relora_ds.lab.experiments.suite_report import best_of, measured
from relora_ds.lab.experiments.suites import Row, Suite


def first_runs(suite: Suite, rows: Sequence[Row], overrides: Sequence[str] = (), seeds: int | None = None) -> list[Run]:
    """Return the runs of rows, seed by seed. seeds: of each row; None for the suite's number."""
    return [Run.of(row, seed, overrides) for seed in range(seeds or suite.seeds) for row in rows]


def runs_of_best(
    suite: Suite, rows: Sequence[Row], results: Results, overrides: Sequence[str] = ()
) -> tuple[list[Run], int]:
    """Return the further runs of `rows` that are known so far, and how many more there may be when all rows have ended.

    A suite with `seeds_of_best` trains so many seeds of the best row of every sweep's group, and of every row outside
    of sweeps. Which row is best is decided by the suite's first seeds of the whole group.
    """
    more = range(suite.seeds, suite.seeds_of_best or suite.seeds)
    chosen, unknown = [row for row in rows if row.axis is None], 0
    for axis, group in dict.fromkeys((row.axis, row.group) for row in rows if row.axis):
        swept = [row for row in suite.rows if (row.axis, row.group) == (axis, group)]
        runs = first_runs(suite, swept, overrides)
        left = [run for run in runs if results.read(run) is None]
        if not left:
            chosen += [row for row in rows if row is best_of(measured(suite, runs, results)).row]
        elif all(run.row in rows for run in left):
            unknown += len(more)
    return [Run.of(row, seed, overrides) for seed in more for row in chosen], unknown
