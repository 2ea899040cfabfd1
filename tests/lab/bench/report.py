"""Write the tables and figures of docs/results/ from the measurements beside them: `python -m tests.lab.bench.report`.

In PAGE.md a table stands between `<!-- NAME -->` and `<!-- end of NAME -->`; its measurement is PAGE/NAME.json, or what
is in PAGE/NAME.
"""

import importlib
import json
import re
from pathlib import Path

from relora_ds.config import ModelConfig
from relora_ds.lab.bench.baselines import FULL, WIDE
from relora_ds.lab.bench.environment import remark_on_seeds, rows_as_markdown
from relora_ds.lab.bench.throughput import speed_of
from relora_ds.models.build import build_config

DOCS = Path(__file__).parents[3] / "docs" / "results"
README = DOCS.parents[1] / "README.md"
PAGES = ("quantization", "benchmarks")
OF_LOSSES = ("quality",)  # benchmarks that quote losses of runs from random weights
COSTS = {  # the rows of the README's table: variant -> its name there
    "full rank": "full rank",
    "PEFT, same modules train": "LoRA by PEFT, the same modules train",
    "ours, dense": "ReLoRA",
    "ours, LoRA alone": "ReLoRA, `trainable_modules: []`",
    "ours, int8": "ReLoRA, `frozen_dtype: int8`",
}
STEPS = {  # the columns of the table of widths
    "PEFT, same modules train": "PEFT",
    "ours, separate": "both, separate",
    "ours, dense": "both, auto",
    "ours, one-sided, separate": "B, separate",
    "ours, one-sided, random": "B, auto",
}
TABLE = re.compile(r"^<!-- (\w+) -->\n(.*?)^<!-- end of \1 -->$", re.MULTILINE | re.DOTALL)


def measurements(page: str) -> dict[str, dict]:
    """The records of a page, by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((DOCS / page).glob("*.json"))}


def block(record: dict) -> str:
    """The table of one measurement, and on what it was made."""
    from relora_ds.lab.bench import BENCHMARKS

    made = dict(record["conditions"])
    device, cores = made.pop("device"), made.pop("cores")
    made.pop("commit", None)  # in the record
    made.pop("threads")  # of the process that collects; what measures has its own, in the table's first line
    versions = ", ".join(f"{library} {version}" for library, version in made.items())
    module = importlib.import_module(f"relora_ds.lab.bench.{BENCHMARKS[record['bench']][0]}")
    remark = remark_on_seeds(record["conditions"]) if record["bench"] in OF_LOSSES else None
    lines = [module.markdown(record["result"]), f"*{device}, {cores} cores; {versions}.*", remark]
    return "\n" + "\n\n".join(line for line in lines if line) + "\n\n"


def filled(page: str) -> str:
    """The page with every table as it is measured."""
    records = measurements(page)
    return _with_tables(page, lambda name: widths() if name == "widths" else block(records[name]))


def widths() -> str:
    """Return the table of steps by width, rank and precision."""
    records = measurements("benchmarks/widths").values()
    head = ["precision", "hidden", "r", "full rank, tokens/s", *STEPS.values(), "auto folds, both", "auto folds, B"]
    rows = sorted(_of_width(record["result"]) for record in records)
    made = dict.fromkeys(f"*{one['conditions']['device']}, torch {one['conditions']['torch']}.*" for one in records)
    return "\n" + "\n\n".join([rows_as_markdown([head, *([*map(str, row)] for row in rows)]), *made]) + "\n\n"


def _of_width(result: dict) -> list:
    """Return the cells of one measurement: speeds over full rank, and in parentheses what the FLOPs allow."""
    rows = {row["variant"]: row for row in result["rows"]}
    full = rows[FULL]

    def speed(name: str) -> str:
        ceiling = full["flops_per_token"] / rows[name]["flops_per_token"]
        return f"{speed_of(rows[name], result['rows']):.2f} ({ceiling:.2f})"

    def folds(separate: str, auto: str) -> str:
        return "yes" if rows[auto]["flops_per_token"] < rows[separate]["flops_per_token"] else "no"

    _, separate, auto, separate_B, auto_B = STEPS
    network = ModelConfig(preset=result["preset"])
    width = WIDE[network.preset][1] if network.preset in WIDE else build_config(network, 2048, 256).hidden_size
    return [
        result["precision"],
        width,
        result["r"],
        f"{full['tokens_per_s']:,.0f}",
        *map(speed, STEPS),
        folds(separate, auto),
        folds(separate_B, auto_B),
    ]


def filled_cards() -> str:
    """The page of GPUs, with all that were checked: one line of each, and the tables of each."""
    from relora_ds.lab.bench import gpu_report

    records = measurements("gpu")
    each = [f"### {name}\n{block(record)}" for name, record in records.items()]
    return _with_tables("gpu", lambda _: "\n".join([gpu_report.cards(records), "", *each]))


def costs() -> str:
    """Return the README's table: bytes and seconds of a step between two hosts, and the peak memory of a step."""
    hosts = measurements("benchmarks")["two_hosts_1gbit"]["result"]["rows"]
    cable = {row["variant"]: row for row in hosts if row["shape"] == "wide_4"}
    memory = {row["variant"]: row for row in measurements("quantization")["memory_350m"]["result"]["rows"]}
    table = [["", "bytes sent per rank and step ¹", "time of the step ¹", "peak memory of a step ²"]]
    for variant, name in COSTS.items():
        sent, peak = cable.get(variant), memory.get(variant)
        table.append(
            [
                name,
                f"{sent['wire'] / 1e6:,.0f} MB" if sent else "",
                f"{sent['step_s']:.1f} s" if sent else "",
                f"{peak['peak_bytes'] / 1e9:.1f} GB" if peak else "",
            ]
        )
    return f"\n{rows_as_markdown(table)}\n\n"


def filled_readme() -> str:
    """Return the README with its table of costs as it is measured."""
    text = README.read_text(encoding="utf-8")
    return TABLE.sub(lambda found: f"<!-- {found[1]} -->\n{costs()}<!-- end of {found[1]} -->", text)


def _with_tables(page: str, table) -> str:
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    return TABLE.sub(lambda found: f"<!-- {found[1]} -->\n{table(found[1])}<!-- end of {found[1]} -->", text)


def main() -> None:
    """Write all pages and their figures."""
    from relora_ds.lab.bench.two_hosts import with_predictions
    from relora_ds.lab.figures.plot_benchmarks import save_clusters, save_two_hosts

    for page in PAGES:
        (DOCS / f"{page}.md").write_text(filled(page), encoding="utf-8")
    (DOCS / "gpu.md").write_text(filled_cards(), encoding="utf-8")
    README.write_text(filled_readme(), encoding="utf-8")
    results = {name: record["result"] for name, record in measurements("benchmarks").items()}
    hosts = [with_predictions(results[f"two_hosts_{rate}"]) for rate in ("10gbit", "1gbit", "100mbit")]
    rows = [row for result in hosts for row in result["rows"]]
    save_two_hosts({"rows": rows}, DOCS / "benchmarks" / "two_hosts.png")
    save_clusters(results["clusters"], DOCS / "benchmarks" / "clusters.png")


if __name__ == "__main__":
    main()
