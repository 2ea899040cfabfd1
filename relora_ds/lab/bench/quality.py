"""Does a quantized base learn as well? The same training run in every storage format, three seeds each, on WikiText-2.

Every run is `python -m relora_ds train` with its own directory under `--runs`: the same tokens in the same order, the
same warm start, five restarts. What differs is `relora.frozen_dtype` and `frozen_master`. A run that is finished is
not repeated, so that an interrupted comparison resumes where it was.

The precision is fp32 (where the frozen weights are dequantized to), so that nothing but the storage rounds; bf16
storage in an fp32 run is the reference. Pass `precision=bf16` on a GPU for runs that also compute in bf16.
"""

import argparse
import dataclasses
import importlib.util
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from relora_ds.config import Recipe, load_recipe
from relora_ds.data.corpora import documents
from relora_ds.lab.bench.environment import rows_as_markdown
from relora_ds.training.metrics_log import read_metrics

RECIPE = "quickstart"
SETTINGS = (
    "precision=fp32",
    "model.preset=llama_9m",
    "method=relora",
    "warm_start_steps=120",
    "relora.restart_every=80",
    "relora.restart_warmup_steps=8",
    "relora.residual_every=null",
    "train.steps=600",
    "train.batch_sequences=8",
    "train.micro_batch_size=8",
    "optim.lr=4e-3",
    "optim.warm_start_lr=2e-3",
    "optim.warmup_steps=20",
    "data.vocab_size=2048",
    "eval.every=1000000",
    "eval.samples=0",
    "log.every=5",
)
VALIDATION_ARTICLES = 8  # of the validation split's 60: evaluating on all of it would take longer than training

REFERENCE = "bf16"
# name -> overrides
VARIANTS = {
    "bf16": ("relora.frozen_dtype=bf16",),
    "nf4": ("relora.frozen_dtype=nf4",),
    "int8": ("relora.frozen_dtype=int8",),
    "fp8": ("relora.frozen_dtype=fp8",),
    "nf4, double": ("relora.frozen_dtype=nf4", "relora.frozen_double_quant=true"),
    "fp32": ("relora.frozen_dtype=fp32",),
    "nf4, no master": ("relora.frozen_dtype=nf4", "relora.frozen_master=none"),
    "int8, no master": ("relora.frozen_dtype=int8", "relora.frozen_master=none"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs",
        type=Path,
        default=Path("runs/quality"),
        metavar="DIR",
        help="where the runs are, or will be (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="runs of each format (default: %(default)s)")
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=list(VARIANTS),
        metavar="NAME",
        help=f"of {', '.join(map(repr, VARIANTS))} (default: all); {REFERENCE!r} is always among them",
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads a run (default: %(default)s)")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw the curves into this file")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes of the runs' recipe")


def run(arguments: argparse.Namespace) -> dict:
    """Train what is missing, then compare.

    Raises:
        ValueError: a run failed, `--runs` holds runs with other settings, or matplotlib is missing for `--figure`.
    """
    if arguments.figure and importlib.util.find_spec("matplotlib") is None:  # known before hours of training
        raise ValueError("--figure: matplotlib draws it, which is not installed; pip install '.[plot]'")
    names = list(dict.fromkeys([REFERENCE, *arguments.variants]))
    runs = arguments.runs.resolve()
    common = [*SETTINGS, f"data.validation={_validation_file(runs, arguments.overrides)}", *arguments.overrides]
    # One seed of every format first: an interrupted comparison is then one of all formats.
    plans = [_Run(runs, name, seed, common) for seed in range(arguments.seeds) for name in names]
    waiting = [plan for plan in plans if not plan.is_finished()]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        failures = [failure for failure in pool.map(lambda plan: plan.train(arguments.threads), waiting) if failure]
    if failures:
        raise ValueError("\n".join(failures))
    result = compare({name: [plan.read() for plan in plans if plan.name == name] for name in names})
    result["settings"] = [RECIPE, *SETTINGS, *arguments.overrides]
    if arguments.figure:
        from relora_ds.lab.figures.plot_quality import save_quality

        save_quality(result, arguments.figure)
    return result


@dataclasses.dataclass(frozen=True)
class _Run:
    runs: Path
    name: str
    seed: int
    settings: list[str]

    @property
    def directory(self) -> Path:
        return self.runs / f"{self.name.replace(', ', '_').replace(' ', '_')}_seed{self.seed}"

    @property
    def overrides(self) -> list[str]:
        return [
            *self.settings,
            *VARIANTS[self.name],
            f"seed={self.seed}",
            f"run_dir={self.directory}",
            "overwrite=true",
        ]

    def is_finished(self) -> bool:
        if not (self.directory / "summary.json").is_file():
            return False
        if _settings(load_recipe(self.directory / "recipe.yaml")) != _settings(load_recipe(RECIPE, self.overrides)):
            raise ValueError(f"--runs: {self.directory} is a run with other settings; use another directory")
        return True

    def train(self, threads: int) -> str | None:
        """Return why it failed, or None."""
        log = self.runs / f"{self.directory.name}.log"
        with open(log, "w", encoding="utf-8") as output:
            code = subprocess.run(
                [sys.executable, "-m", "relora_ds", "train", "--config", RECIPE, *self.overrides],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "OMP_NUM_THREADS": str(threads)},
                check=False,
            ).returncode
        print(f"{self.directory.name}: {'done' if code == 0 else f'failed, see {log}'}", file=sys.stderr, flush=True)
        return None if code == 0 else f"{self.directory.name}: exit code {code}; see {log}"

    def read(self) -> dict:
        """Return what the comparison needs of a finished run."""
        lines = read_metrics(self.directory)
        summary = json.loads((self.directory / "summary.json").read_text())
        tokens_per_step = summary["tokens"] / summary["step"]
        restarts = [line for line in lines if line["kind"] == "restart"]
        evaluations = [line for line in lines if line["kind"] == "eval"]
        return {
            "seed": self.seed,
            "val_loss": summary["val_loss"],
            "val_tokens": summary["val_tokens"],
            "tokens": summary["tokens"],
            "restarts": summary["restarts"],
            "seconds": summary["seconds"],
            "merge_loss": [line["merge_loss"] for line in restarts],
            "merge_loss_total": restarts[-1]["merge_loss_total"] if restarts else None,
            "curve": [[tokens_per_step * line["step"], line["val_loss"]] for line in evaluations],
        }


def compare(runs: dict[str, list[dict]]) -> dict:
    """Return validation losses beside those of the reference with the same seed.

    Args:
        runs: what `_Run.read` returns, by variant; the same seeds in the same order.

    Raises:
        ValueError: runs of other lengths or on other validation tokens are no comparison.
    """
    for what in ("tokens", "val_tokens", "restarts"):
        if len(seen := {one[what] for found in runs.values() for one in found}) > 1:
            raise ValueError(
                f"--runs: the runs differ in {what} ({', '.join(map(str, sorted(seen)))}); use another directory"
            )
    reference = [one["val_loss"] for one in runs[REFERENCE]]
    variants = {}
    for name, found in runs.items():
        losses = [one["val_loss"] for one in found]
        differences = [100 * (loss / base - 1) for loss, base in zip(losses, reference, strict=True)]
        totals = [one["merge_loss_total"] for one in found]
        variants[name] = {
            "val_loss": statistics.mean(losses),
            "val_loss_by_seed": losses,
            "difference_percent": statistics.mean(differences),
            "difference_percent_by_seed": differences,
            "merge_loss_total": None if None in totals else statistics.mean(totals),
            "runs": found,
        }
    one = runs[REFERENCE][0]
    return {
        "reference": REFERENCE,
        "tokens": one["tokens"],
        "val_tokens": one["val_tokens"],
        "restarts": one["restarts"],
        "seeds": len(reference),
        "variants": variants,
    }


def markdown(result: dict) -> str:
    """Return the table."""
    reference = result["reference"]
    rows = [
        [
            "frozen weights",
            "validation loss, by seed",
            "mean",
            f"against {reference}, by seed",
            "mean",
            "update lost in storage",
        ]
    ]
    for name, found in result["variants"].items():
        is_reference = name == reference
        rows.append(
            [
                name,
                " ".join(f"{loss:.4f}" for loss in found["val_loss_by_seed"]),
                f"{found['val_loss']:.4f}",
                "reference" if is_reference else " ".join(f"{d:+.2f} %" for d in found["difference_percent_by_seed"]),
                "" if is_reference else f"{found['difference_percent']:+.2f} %",
                "" if found["merge_loss_total"] is None else f"{100 * found['merge_loss_total']:.3g} %",
            ]
        )
    seeds = "1 seed" if result["seeds"] == 1 else f"{result['seeds']} seeds"
    return (
        f"{seeds}, {result['tokens']:,} tokens and {result['restarts']} restarts a run, "
        f"{result['val_tokens']:,} validation tokens\n\n{rows_as_markdown(rows)}"
    )


def _validation_file(runs: Path, overrides: list[str]) -> Path:
    """Return a file of the first articles of the corpus' validation split, one a line; write it if it is not there."""
    path = runs / "validation.jsonl"
    if not path.is_file():
        data = load_recipe(RECIPE, [*SETTINGS, *overrides]).data
        articles = [text for text, _ in zip(documents(data, "validation"), range(VALIDATION_ARTICLES), strict=False)]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in articles), encoding="utf-8")
    return path


def _settings(recipe: Recipe) -> Recipe:
    """Return a recipe without the paths that change when a directory of runs is moved, and without how it started."""
    data = dataclasses.replace(recipe.data, validation=None)
    return dataclasses.replace(recipe, run_dir=None, resume=False, overwrite=False, data=data)
