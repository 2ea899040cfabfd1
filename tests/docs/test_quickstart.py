"""docs/guides/quickstart.md shows one run: its last lines follow from the others."""

import math
import re

import numpy as np

from relora_ds.lab.figures.run_history import RunRecord
from relora_ds.lab.figures.sentences import sentences
from tests.docs.pages import DOCS, fenced

(PRINTED,) = fenced(DOCS / "guides/quickstart.md", "text")
UNITS = {"k": 1e3, "M": 1e6, "GB": 1e9}


def number(text: str) -> float:
    value, unit = re.fullmatch(r"([\d.]+) ?(\w*)", text).groups()
    return float(value) * UNITS[unit]


def found(pattern: str) -> list:
    return re.findall(pattern, PRINTED, re.MULTILINE)


def the_run() -> RunRecord:
    """What the lines before the last ones say. Its perplexities have more digits than its losses."""
    evaluations = found(r"│ (\d+) \(\w+\) +│ +[\d.]+ │ +([\d.]+) │ +[\d.]+ │ +([\d.]+) │")
    steps, perplexities, bits = np.array(evaluations, dtype=float).T
    losses = {int(step): float(loss) for step, loss in found(r"^step +(\d+)/400 .* loss ([\d.]+)")}
    sent = {
        int(step): (number(ours), number(full))
        for step, ours, full in found(r"^step (\d+)  validation.* so far ([\d.]+ GB), full rank ([\d.]+ GB)")
    }
    ((method, trainable, total),) = found(r"^step 0  (\w+): ([\d.]+M) of ([\d.]+M) parameters train")
    (tokens,) = found(r"steps, ([\d.]+k) tokens and")
    logged = sorted(losses.keys() | sent.keys())
    ours, full = np.array([sent.get(step, (math.nan, math.nan)) for step in logged]).T
    return RunRecord(
        name="quickstart",
        method=method,
        state="done",
        reason="",
        verdict="",
        train={
            "step": np.array(logged, dtype=float),
            "loss": np.array([losses.get(step, math.nan) for step in logged]),
            "tokens": np.full(len(logged), number(tokens)),
            "total_bytes_wire": ours,
            "full_rank_bytes_wire": full,
        },
        evaluations={"step": steps, "val_loss": np.log(perplexities), "bits_per_byte": bits},
        restarts=[],
        transitions=[],
        trainable=int(number(trainable)),
        total=int(number(total)),
        samples=[found(r"^  sample: (.*) >> (.*)$")[-1]],
    )


def test_the_last_lines_say_what_the_others_do():
    *said, figures = PRINTED.splitlines()[-6:]
    assert said == "\n  ".join(sentences(the_run())).splitlines()
    assert figures.startswith("figures in runs/quickstart/plots: loss.png, ")


def test_the_table_explains_lines_that_are_printed():
    text = (DOCS / "guides/quickstart.md").read_text(encoding="utf-8").split("## Reading the output")[1]
    for cell in re.findall(r"^\| (`.*?`) \|", text, re.MULTILINE):
        for words in re.findall(r"`([^`]+)`", cell):
            assert all(part.strip() in PRINTED for part in words.split("…")), words
