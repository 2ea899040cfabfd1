"""Write the tables of suites in docs/results/training*.md and README.md: `python -m tests.lab.experiments.results`.

A suite's table stands between `<!-- SCALE SUITE -->` and `<!-- end of SCALE SUITE -->`, `overview`'s between
`<!-- overview SCALE SUITE -->` and its end. It has the rows whose recipes are what the shipped recipes say today. A
recipe that changes takes its rows from the pages until they are trained again. The variants of `levers` stand between
`<!-- levers -->` and its end.
"""

import json
import re
from pathlib import Path

from relora_ds.lab.bench.environment import rows_as_markdown
from relora_ds.lab.experiments import seeds, suite_report
from relora_ds.lab.experiments.runs import Results, Run
from relora_ds.lab.experiments.suites import Suite, read_suite
from tests.lab.experiments import link_times, overview
from tests.lab.experiments.levers import results as levers

ROOT = Path(__file__).parents[3]
RESULTS = ROOT / "docs" / "results"
PAGES = (RESULTS / "training.md", RESULTS / "training_mini.md", ROOT / "README.md")
TIMES = re.compile(r"^<!-- times of islands -->\n.*?^<!-- end of times of islands -->$", re.MULTILINE | re.DOTALL)
LEVERS = re.compile(r"^<!-- levers -->\n.*?^<!-- end of levers -->$", re.MULTILINE | re.DOTALL)
TABLE = re.compile(r"^<!-- (overview )?(\w+) (\w+) -->\n(.*?)^<!-- end of \1?\2 \3 -->$", re.MULTILINE | re.DOTALL)


def measured(scale: str, name: str) -> tuple[Suite, list[Run], list[suite_report.Measured]]:
    """A suite, its runs, and the rows that have results."""
    suite = read_suite(name, scale)
    kept = Results(RESULTS / scale)
    best, _ = seeds.runs_of_best(suite, suite.rows, kept)
    runs = [*seeds.first_runs(suite, suite.rows), *best]
    return suite, runs, suite_report.measured(suite, runs, kept)


def block(scale: str, name: str) -> str:
    """What `reproduce` writes of a suite, without title and question."""
    suite, runs, rows = measured(scale, name)
    told = suite_report.blocks(suite, rows, len(runs))[1:]
    return "\n\n".join(one if isinstance(one, str) else rows_as_markdown(one) for one in told)


def with_costs(scale: str, name: str) -> str:
    """Its rows with how well they learned and what they cost."""
    suite, _, rows = measured(scale, name)
    return "\n\n".join(
        [
            overview.table(rows, suite.rows[0].name),
            *suite_report.remarks_on_texts(rows),
            *suite_report.remarks_on_seeds(rows),
        ]
    )


def times() -> str:
    """How long the runs of suite `islands` take over a link, where one has been measured."""
    record = json.loads((RESULTS / "benchmarks" / "islands_tiny.json").read_text(encoding="utf-8"))["result"]
    return rows_as_markdown(link_times.table(measured("tiny", "islands")[2], record, "100mbit/50ms"))


def filled(text: str) -> str:
    """A page with every table as it is measured."""

    def fill(found: re.Match) -> str:
        name = f"{found[1] or ''}{found[2]} {found[3]}"
        table = (with_costs if found[1] else block)(found[2], found[3])
        return f"<!-- {name} -->\n\n{table}\n\n<!-- end of {name} -->"

    text = TABLE.sub(fill, text)
    text = TIMES.sub(f"<!-- times of islands -->\n\n{times()}\n\n<!-- end of times of islands -->", text)
    return LEVERS.sub(f"<!-- levers -->\n\n{levers.table()}\n\n<!-- end of levers -->", text)


if __name__ == "__main__":
    for page in PAGES:
        page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
