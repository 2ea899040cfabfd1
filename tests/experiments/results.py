"""The tables of docs/results.md, from the runs kept beside it: `python -m tests.experiments.results` writes them.

A suite's table stands between `<!-- SCALE SUITE -->` and `<!-- end of SCALE SUITE -->`. It has the rows whose recipes
are what the shipped recipes say today: a recipe that changes takes its rows from the page until they are trained again.
"""

import re
from pathlib import Path

from relora_ds.bench.record import rows_as_markdown
from relora_ds.experiments import report
from relora_ds.experiments.runs import Results, Run
from relora_ds.experiments.suites import read_suite

PAGE = Path(__file__).parents[2] / "docs" / "results.md"
TABLE = re.compile(r"^<!-- (\w+) (\w+) -->\n(.*?)^<!-- end of \1 \2 -->$", re.MULTILINE | re.DOTALL)


def kept(scale: str) -> Results:
    """The results of a scale."""
    return Results(PAGE.with_suffix("") / scale)


def measured(scale: str, name: str) -> tuple:
    """A suite, its runs, and the rows that have results."""
    suite = read_suite(name, scale)
    runs = [Run.of(row, seed) for row in suite.rows for seed in range(suite.seeds)]
    return suite, runs, report.measured(suite, runs, kept(scale))


def block(scale: str, name: str) -> str:
    """What `reproduce` writes of a suite, without its title."""
    suite, runs, rows = measured(scale, name)
    told = report.blocks(suite, rows, len(runs))
    return "\n\n".join(one if isinstance(one, str) else rows_as_markdown(one) for one in told)


def filled() -> str:
    """The page with every table as it is measured."""
    return TABLE.sub(lambda found: f"<!-- {found[1]} {found[2]} -->\n\n{block(found[1], found[2])}\n\n"
                                   f"<!-- end of {found[1]} {found[2]} -->", PAGE.read_text(encoding="utf-8"))


if __name__ == "__main__":
    PAGE.write_text(filled(), encoding="utf-8")
