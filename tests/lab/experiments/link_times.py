"""How long the runs of suite `islands` would take over a slow link.

Steps, restarts and exchanges of the same network have been measured over links by `bench islands`, and the losses by
`reproduce islands` without one. A run's time is that of its steps and pauses, without evaluations and checkpoints.
"""

import math
import statistics

from relora_ds.config import load_recipe, methods_of
from relora_ds.lab.bench.island_times import ISLANDS, PARALLEL, pause_of, seconds_of, seconds_to
from relora_ds.lab.experiments import suite_report
from relora_ds.lab.experiments.link_bytes import link_bytes
from relora_ds.utils.text import human_bytes

HOSTS = 2
_NAMES = {"full": "full", "relora": "relora", "galore": "one-sided"}  # of methods, as the benchmark calls them


def seconds_over(result: dict, bench: dict) -> float:
    """The time of a run over a link. bench: `{(method, way): row of the benchmark}`."""
    recipe = load_recipe(result["recipe"][0], result["recipe"][1:])
    methods, is_island = methods_of(recipe), recipe.islands.count is not None
    warm = methods[-1].warm_start_steps
    seconds = 0.0
    for method, steps in zip(reversed(methods), (recipe.total_steps - warm, warm), strict=False):
        row = bench[_NAMES[method.name], ISLANDS if is_island else PARALLEL]
        if is_island:
            every = recipe.islands.sync_every if method.num_restarts == 0 else recipe.relora.restart_every
            pauses = math.ceil(steps / every)
        else:
            pauses = method.num_restarts
        seconds += seconds_to(steps, row["step_s"], pauses, pause_of(row))
    return seconds


def by_row(rows: list[suite_report.Measured], record: dict, link: str) -> dict[str, float]:
    """The time of everything that two hosts can be, by row. See `table`."""
    bench = {(row["method"], row["way"]): row for row in record["rows"] if row["link"] == link}
    kept = [row for row in rows if row.results[0].get("islands") in (None, HOSTS)]
    return {row.row.name: seconds_over(row.results[0], bench) for row in kept}


def table(rows: list[suite_report.Measured], record: dict, link: str) -> list[list[str]]:
    """Loss, bytes and time of everything that two hosts can be, with its head.

    rows: of suite `islands`, the first of them full rank; record: of `bench islands` on the same network.
    """
    own = by_row(rows, record, link)
    kept = [row for row in rows if row.row.name in own]
    first = kept[0]
    told = [["row", "validation loss", "over its link", f"time over {link}", "times as fast", "above full rank"]]
    for row in kept:
        seconds = own[row.row.name]
        told.append(
            [
                row.row.name,
                suite_report.spread(row.losses),
                human_bytes(link_bytes(row.results[0], [HOSTS])[0]),
                seconds_of(seconds),
                f"{own[first.row.name] / seconds:.3g}",
                "" if row is first else f"{statistics.mean(row.differences(first)):+.3f}",
            ]
        )
    return told
