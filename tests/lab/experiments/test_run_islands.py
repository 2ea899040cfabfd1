"""Runs of `reproduce` that consist of islands."""

import json
import time

import pytest

from relora_ds.config import load_recipe
from relora_ds.lab.experiments import suite_report
from relora_ds.lab.experiments.link_bytes import data_parallel_bytes, link_bytes
from relora_ds.lab.experiments.runner import Runner
from relora_ds.lab.experiments.runs import Results, Run
from relora_ds.lab.experiments.suites import Row, read_suite
from tests.lab.experiments.test_reproduce import RELORA, SMALL

ISLANDS = (*SMALL, *RELORA, "train.batch_sequences=2", "train.micro_batch_size=2", "islands.sync_every=2")


def run_of(name: str) -> Run:
    row = next(row for row in read_suite("islands", "tiny").rows if row.name == name)
    return Run.of(row, 0, ISLANDS)


@pytest.mark.slow  # two runs at the same time
def test_all_islands_are_trained_and_the_first_tells_of_them(tmp_path):
    run, results = run_of("ReLoRA, 2 islands, H 50"), Results(tmp_path / "results")
    assert Runner(tmp_path / "runs", threads=1).train_all([run], results, 1, print) == []
    result = results.read(run)
    assert (result["islands"], result["tokens"]) == (2, 12 * 2 * 2 * 64) == (2, run.tokens)
    assert result["exchanges"] == 2 + 3  # of 4 steps of warm start, and of 8 with a restart after every third
    directories = sorted(path.name for path in (tmp_path / "runs" / run.name).iterdir() if path.is_dir())
    assert directories == ["island-0", "island-1", "rounds"]
    for index in (0, 1):
        summary = json.loads((tmp_path / "runs" / run.name / f"island-{index}" / "summary.json").read_text())
        assert summary["val_loss"] == result["val_loss"]
    assert link_bytes(result, [2]) == [result["bytes_exchanged"]]


@pytest.mark.slow
def test_an_island_that_fails_fails_the_run(tmp_path):
    run = run_of("full rank, 2 islands, H 50")
    (tmp_path / run.name / "island-1").mkdir(parents=True)
    (tmp_path / run.name / "island-1" / "recipe.yaml").write_text("method: none\n")
    started = time.monotonic()
    failure = Runner(tmp_path, threads=1).train(run)
    assert failure is not None and "island-1" in failure
    assert time.monotonic() - started < run.recipe.islands.timeout_s / 3, "the other one is not left waiting"


def test_bytes_of_data_parallel_are_those_of_every_phase():
    recipe = load_recipe("tiny_relora")
    full, low_rank, steps = 231_744, 141_248, 8000  # of its header
    assert data_parallel_bytes(recipe, 2) == 4 * (2000 * full + 6000 * low_rank)
    assert data_parallel_bytes(load_recipe("tiny_full"), 4) == steps * 4 * full * 3 // 2
    for method in ("muon", "scale"):  # what owners train is reduced and broadcast
        assert data_parallel_bytes(load_recipe("tiny_full", [f"method={method}"]), 2) == 4 * steps * full
    result = {"islands": None, "recipe": ["tiny_full"]}
    assert link_bytes(result, [2, 4]) == [2 * steps * 4 * full, 3 * steps * 4 * full] and link_bytes(result, []) == []


def row_of(name: str, *results: dict, group: str | None = None) -> suite_report.Measured:
    found = [{"islands": None, "recipe": ["tiny_full"], **result} for result in results]
    return suite_report.Measured(Row(name, "tiny_full", group=group), found)


def test_the_figure_of_the_link_has_islands_and_data_parallel_of_as_many_ranks():
    full = row_of("full rank", {"val_loss": 3.0}, {"val_loss": 3.2})
    two = [
        row_of(f"two, H {h}", {"val_loss": loss, "islands": 2, "bytes_exchanged": sent}, group="two")
        for h, loss, sent in ((50, 3.1, 900), (200, 3.3, 300))
    ]
    four = row_of("four", {"val_loss": 3.4, "islands": 4, "bytes_exchanged": 700})
    recipe = load_recipe("tiny_full")
    assert suite_report.links([full, *two, four]) == {
        "full rank, 2 ranks": [(2 * data_parallel_bytes(recipe, 2), [3.0, 3.2])],
        "full rank, 4 ranks": [(2 * data_parallel_bytes(recipe, 4), [3.0, 3.2])],
        "two": [(900, [3.1]), (300, [3.3])],
        "four": [(700, [3.4])],
    }
    assert suite_report.links([full]) == {}
