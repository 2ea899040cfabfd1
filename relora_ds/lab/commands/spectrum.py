"""`python -m relora_ds spectrum`."""

import argparse
import json
from pathlib import Path

from relora_ds.commands.recipes import rows_as_text
from relora_ds.lab.commands.plot import needs_matplotlib


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        type=Path,
        nargs="+",
        metavar="RUN",
        help="run directories (their newest checkpoint), or RUN/checkpoints/step_…",
    )
    parser.add_argument(
        "--before",
        metavar="STEP_OR_PATH",
        help="where the updates begin: a step of each run, or a run or checkpoint of the same network "
        "(default: the end of the warm start, else the oldest checkpoint that is kept)",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write figures, as PNGs")
    parser.add_argument("--trust-remote-code", action="store_true", help="for a model whose code is not transformers'")
    parser.add_argument("--json", action="store_true", help="print one JSON object with every singular value")


def run(arguments: argparse.Namespace) -> int:
    if arguments.out:
        with needs_matplotlib("--out"):
            from relora_ds.lab.figures.plot_spectra import save_spectra
    from relora_ds.training.terminal import quieten_libraries

    quieten_libraries()
    from relora_ds.lab.experiments.update_spectra import measure

    result = measure(arguments.runs, arguments.before, arguments.trust_remote_code)
    print(json.dumps(result) if arguments.json else "\n".join(_as_text(result)))
    if arguments.out:
        files = save_spectra(result, arguments.out)
        if not arguments.json:
            print(f"figures: {', '.join(map(str, files))}")
    return 0


def _as_text(result: dict) -> list[str]:
    lines = [f"medians over the matrices of a kind; rank: singular values above {result['share']:g} of the largest"]
    for run in result["runs"]:
        low_rank = "" if run["r"] is None else f", r {run['r']}, restarts {run['restarts']}"
        note = f" ({run['note']})" if run["note"] else ""
        lines += ["", f"{run['name']}: {run['method']}{low_rank}; step {run['start']} to {run['stop']}{note}"]
        rows = [
            ["layers", "matrices", "at most", "rank", "stable rank", "effective rank", f"below {result['small']:g}"]
        ]
        rows += [
            [
                kind,
                str(about["num_matrices"]),
                str(about["max_rank"]),
                _rank(about),
                f"{about['stable_rank']:.1f}",
                "-" if about["effective_rank"] is None else f"{about['effective_rank']:.1f}",
                "-" if about["num_below"] is None else f"{about['num_below']} of {about['num_values']}",
            ]
            for kind, about in run["kinds"].items()
        ]
        rows.append(
            [
                "all",
                str(sum(about["num_matrices"] for about in run["kinds"].values())),
                "",
                f"{run['numerical_rank']:g}",
                "",
                "",
                "",
            ]
        )
        lines += rows_as_text(rows)
    return lines


def _rank(about: dict) -> str:
    """Return where only the largest singular values are known, the rank may be more than they are."""
    num_known = min(map(len, about["singular_values"]))
    at_least = "" if about["is_exact"] or about["numerical_rank"] < num_known else ">= "
    return f"{at_least}{about['numerical_rank']:g}"
