"""The scores of a network on lm-eval's tasks."""

import contextlib
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from relora_ds.interop.lm_tasks import Tasks

# {task: {metric: value}}; a metric's standard error is called METRIC_stderr.
Scores = dict[str, dict[str, float]]

_SEED = 1234  # lm-eval's own
_RESAMPLES = 1000  # for the standard error of metrics that are no mean


@torch.no_grad()
def scores(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Tasks,
    *,
    batch_size: int,
    max_length: int | None,
    of_run: bool,
    show_progress: bool = False,
) -> Scores:
    """Evaluate a network on tasks (of `lm_tasks.load`). Collective; every rank returns the same.

    Args: see `SharedNetwork`. show_progress: lm-eval's bars, on stderr.
    """
    from lm_eval.evaluator import evaluate

    from relora_ds.interop.lm_network import SharedNetwork

    for task in tasks["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(_SEED)
    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # no processes beside those of a run
    for seed in (random.seed, np.random.seed, torch.manual_seed):  # what a task draws is the same on all ranks
        seed(_SEED)
    network = SharedNetwork(model, tokenizer, batch_size=batch_size, max_length=max_length, of_run=of_run)
    with _output(show_progress):
        found = evaluate(network, tasks, bootstrap_iters=_RESAMPLES, log_samples=False)
    return {name: _metrics(values) for name, values in found["results"].items()}


def rows_of(scores: Scores) -> list[list[str]]:
    """Return rows for a table: task, metric, value, standard error."""
    return [
        [task, metric, f"{value:.4f}", f"{error:.4f}" if (error := values.get(_error_of(metric))) is not None else ""]
        for task, values in scores.items()
        for metric, value in values.items()
        if not _is_error(metric)
    ]


def _metrics(values: dict[str, Any]) -> dict[str, float]:
    """Return lm-eval's numbers for a task: `acc,none` as `acc`, `exact_match,strict` as `exact_match/strict`."""
    return {
        key.removesuffix(",none").replace(",", "/"): float(value)
        for key, value in values.items()
        if "," in key and isinstance(value, (int, float, np.number))
    }


def _error_of(metric: str) -> str:
    name, slash, of_filter = metric.partition("/")
    return f"{name}_stderr{slash}{of_filter}"


def _is_error(metric: str) -> bool:
    return metric.partition("/")[0].endswith("_stderr")


@contextlib.contextmanager
def _output(is_shown: bool) -> Iterator[None]:
    """Keep what lm-eval prints off stdout: its bars go to stderr or nowhere."""
    with contextlib.ExitStack() as stack:
        target = sys.stderr if is_shown else stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        stack.enter_context(contextlib.redirect_stdout(target))
        stack.enter_context(contextlib.redirect_stderr(target))
        yield
