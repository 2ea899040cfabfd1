"""How well every method learned here, how fast its steps are, and what its paper prints."""

from relora_ds.config.names import METHODS
from relora_ds.lab.bench.environment import rows_as_markdown
from relora_ds.lab.bench.throughput import speed_of
from relora_ds.lab.experiments import suite_report
from relora_ds.lab.experiments.suite_report import Measured
from tests.docs import tiny_runs
from tests.lab.bench import report
from tests.lab.experiments import results

FULL = "full rank"
# method -> the suite and the row of its settings, at a rank of a quarter of the width
ROWS = {
    "full": ("galore", FULL),
    "control": ("main", "Control"),
    "lora": ("galore", "LoRA, r 16"),
    "relora": ("galore", "ReLoRA, r 16"),
    "galore": ("galore", "exact, carried, residual, r 16"),
}
# method -> the group of suite `rivals`, of which the best row counts
GROUPS = {
    "switchlora": "SwitchLoRA",
    "cola": "CoLA",
    "crnet": "CR-Net",
    "fira": "Fira",
    "apollo": "APOLLO",
    "apollo_mini": "APOLLO-Mini",
    "scale": "SCALE",
    "muon": "Muon",
    "sst": "SST",
}
SAME = {"cola_m": "cola"}  # the same losses: it only recomputes
STEPS = {  # method -> its row in the benchmark of steps
    "full": FULL,
    "lora": "ours, dense",
    "relora": "ours, dense",
    "galore": "ours, one-sided, residual",
    "cola_m": "CoLA-M",
    **GROUPS,
}
# method -> the perplexity that a paper prints, that of full rank in the same table, and which paper
PUBLISHED = {
    "control": (27.30, 23.65, "2307.05695"),
    "lora": (34.17, 23.65, "2307.05695"),
    "relora": (25.04, 23.65, "2307.05695"),
    "switchlora": (15.01, 15.23, "2406.06564"),
    "galore": (25.36, 25.08, "2403.03507"),
    "cola": (24.48, 25.08, "2502.10940"),
    "crnet": (24.31, 24.36, "2509.18993"),
    "fira": (22.73, 25.08, "2410.01673"),
    "apollo": (22.94, 25.08, "2412.05270"),
    "apollo_mini": (23.84, 25.08, "2412.05270"),
    "scale": (22.57, 23.13, "2506.16659"),
    "muon": (22.20, 23.13, "2506.16659"),
    "sst": (23.35, 20.04, "2405.15481"),
}
UNLIKE = {"switchlora": "LLaMA 1.3B", "sst": "on OpenWebText"}  # the others: LLaMA 130M on C4


def measured(method: str) -> Measured | None:
    """Return the row that stands for a method; None before all of its sweep has ended."""
    method = SAME.get(method, method)
    if method in ROWS:
        return tiny_runs.row(*ROWS[method])
    group, (suite, _, rows) = GROUPS[method], results.measured("tiny", "rivals")
    swept = [row for row in rows if row.row.group == group]
    if len(swept) < sum(row.group == group for row in suite.rows):
        return None
    return suite_report.best_of(swept)


def markdown() -> str:
    """Return the table."""
    heads = ["method", "settings", "seeds", "validation loss", "against full rank", "speed of a step", "published"]
    return rows_as_markdown([heads, *map(_row, METHODS)])


def _row(method: str) -> list[str]:
    row = measured(method)
    learned = ["", "", "", ""]
    if row is not None:
        learned = [
            f"as `{SAME[method]}`" if method in SAME else row.row.name,
            str(len(row.losses)),
            suite_report.spread(row.losses),
            suite_report.against(row, tiny_runs.row(*ROWS["full"])),
        ]
    return [f"`{method}`", *learned, speed(method), published(method)]


def speed(method: str) -> str:
    """Return full rank's seconds of a step over this method's, or nothing where it was not timed."""
    rows = report.measurements("benchmarks")["methods_60m"]["result"]["rows"]
    found = [row for row in rows if row["variant"] == STEPS.get(method)]
    return f"{speed_of(found[0], rows):.2f}x" if found else ""


def published(method: str) -> str:
    """Return what a paper prints for it and for full rank."""
    if method not in PUBLISHED:
        return ""
    own, full, paper = PUBLISHED[method]
    unlike = f", {UNLIKE[method]}" if method in UNLIKE else ""
    return f"{own:.2f}, full rank {full:.2f}{unlike} ([{paper}](https://arxiv.org/abs/{paper}))"
