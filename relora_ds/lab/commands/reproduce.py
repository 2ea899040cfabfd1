"""`python -m relora_ds reproduce`."""

import argparse
import importlib.util
import signal
import sys
from pathlib import Path

from relora_ds.commands.recipes import rows_as_text
from relora_ds.lab.experiments.suites import SCALES, suite_names
from relora_ds.utils.text import human_count


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "words",
        nargs="+",
        metavar="SUITE [section.key=value ...]",
        help=f"of {', '.join(suite_names())}; and overrides for all runs, such as checkpoint.every=500",
    )
    parser.add_argument(
        "--scale",
        choices=SCALES,
        default="tiny",
        help="tokens and networks: tiny, mini for two CPUs, small for one GPU, paper for eight (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, metavar="N", help="runs of each row (default: the suite's)")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these (default: all)")
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/reproduce"),
        metavar="DIR",
        help="where the runs are, or will be (default: %(default)s)",
    )
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="what is kept of each run, tables and figures (default: RUNS/results)",
    )
    parser.add_argument(
        "--num-gpus",
        type=int,
        default=0,
        metavar="N",
        help="of each run, by the deepspeed launcher (default: one process without it)",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: %(default)s)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads of a run")
    parser.add_argument("--dry-run", action="store_true", help="check every recipe, say what it would cost, and stop")


def run(arguments: argparse.Namespace) -> int:
    from relora_ds.lab.experiments import budget, run_islands, suite_report
    from relora_ds.lab.experiments.runner import Runner
    from relora_ds.lab.experiments.runs import Results
    from relora_ds.lab.experiments.suites import read_suite
    from relora_ds.training.exit_codes import DONE, ERROR, PREEMPTED, Preempted

    names, overrides = _words(arguments)
    suites = [read_suite(name, arguments.scale) for name in names]
    results = Results(arguments.results or arguments.runs / "results")
    runs, later = _runs(suites, arguments, results, overrides)
    wanted = _each_once(runs)
    left = [run for run in wanted if results.read(run) is None]
    for run in left:
        run.check_files()
    if not arguments.dry_run:
        run_islands.check(run.recipe for run in left)
    runner = Runner(arguments.runs, arguments.num_gpus, arguments.threads)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: runner.stop())
    try:
        measure = None if arguments.dry_run else budget.trial(runner)
        print("\n".join(_costs(budget.budget(wanted, results, measure), arguments.jobs, later)), flush=True)
        if arguments.dry_run:
            return DONE
        failures = runner.train_all(wanted, results, arguments.jobs, _say)
        if later:
            runs, _ = _runs(suites, arguments, results, overrides)
            first = {run.name for run in wanted}
            best = [run for run in _each_once(runs) if run.name not in first]
            failures += runner.train_all(best, results, arguments.jobs, _say)
    except Preempted:
        print(f"stopped; the same command resumes in {arguments.runs}", file=sys.stderr)
        return PREEMPTED
    for suite in suites:
        for path in suite_report.write(suite, runs[suite.name], results, runner.directory, _has_matplotlib()):
            print(path)
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return ERROR if failures else DONE


def _words(arguments: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Return the suites, each once, and the overrides. ValueError for a number that is none."""
    for option in ("seeds", "jobs", "threads"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ValueError(f"--{option}: {value} is not 1 or more")
    if arguments.num_gpus < 0:
        raise ValueError(f"--num-gpus: {arguments.num_gpus} is not 0 or more")
    names = list(dict.fromkeys(word for word in arguments.words if "=" not in word))
    if not names:
        raise ValueError(f"SUITE: none was given; there are {', '.join(suite_names())}")
    return names, [word for word in arguments.words if "=" in word]


def _chosen(suite, names: list[str] | None) -> list:
    """Rows of the suite, those of a sweep also by what comes before the comma."""
    if names is None:
        return list(suite.rows)
    known = {row.name for row in suite.rows} | {row.group for row in suite.rows if row.group}
    if unknown := [name for name in names if name not in known]:
        raise ValueError(
            f"--rows: {unknown[0]!r} is no row of {suite.name}; there are {', '.join(map(repr, sorted(known)))}"
        )
    return [row for row in suite.rows if row.name in names or row.group in names]


def _runs(suites: list, arguments: argparse.Namespace, results, overrides: list[str]) -> tuple[dict[str, list], int]:
    """Return each suite's runs as far as they are known, and how many may follow; `--seeds` fixes their number."""
    from relora_ds.lab.experiments.seeds import first_runs, runs_of_best

    runs, later = {}, 0
    for suite in suites:
        rows = _chosen(suite, arguments.rows)
        runs[suite.name] = first_runs(suite, rows, overrides, arguments.seeds)
        if arguments.seeds is None:
            best, unknown = runs_of_best(suite, rows, results, overrides)
            runs[suite.name] += best
            later += unknown
    return runs, later


def _each_once(runs: dict[str, list]) -> list:
    """Return the runs, those that several suites have once."""
    return list({run.name: run for found in runs.values() for run in found}.values())


def _costs(lines: list, jobs: int, later: int) -> list[str]:
    """Return the budget as a table. later: how many runs may follow when these have ended."""
    table = [["rows", "runs", "done", "tokens", "left", "tokens/s", "hours"]]
    for line in lines:
        rows = line.rows[0] if len(line.rows) == 1 else f"{line.rows[0]} and {len(line.rows) - 1} like it"
        table.append(
            [
                rows,
                str(line.runs),
                str(line.finished),
                human_count(line.tokens),
                human_count(line.tokens_left),
                "?" if line.tokens_per_s is None else human_count(line.tokens_per_s),
                "?" if line.hours is None else f"{line.hours:.2f}",
            ]
        )
    hours = [line.hours for line in lines]
    known = sum(hour for hour in hours if hour is not None) / jobs
    about = "unknown before a trial" if None in hours else f"{known:.2f} hours"
    at_a_time = "" if jobs == 1 else f", {jobs} at a time"
    told = [f"{sum(line.runs for line in lines)} runs{at_a_time}: {about}, evaluations and checkpoints not counted"]
    if later:
        told.append(f"up to {later} runs more, not counted: further seeds of the best row of each sweep")
    return [*rows_as_text(table), *told]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None
