"""`eval.tasks`: scores when a run is complete, and the same of its export by `relora eval`.

Where lm-eval is not installed (`pip install '.[tasks]'`), the tests that compute with it are skipped.
"""

import importlib.util
import json
import pydoc_data.topics
import re
import shutil
from pathlib import Path
from unittest.mock import patch

import pytest

from relora_ds.__main__ import main
from relora_ds.config import load_recipe, read_recipe
from relora_ds.config.no_effect import warnings
from relora_ds.data import tokenizer
from relora_ds.interop import lm_scores, lm_tasks
from relora_ds.interop.sources import model_of
from relora_ds.training.hooks import tasks
from relora_ds.training.lock import lock
from relora_ds.training.metrics_log import scalars_of
from relora_ds.training.preflight import check
from relora_ds.training.results import add_scores
from relora_ds.training.terminal import Terminal
from relora_ds.training.trainer import Trainer
from tests.docs.pages import DOCS, fenced
from tests.ranks import ranks
from tests.training.runs import lines, run, status

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval: pip install '.[tasks]'"
)
SHORT = ["train.steps=12", "optim.warmup_steps=1", "eval.samples=0"]


def summary_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


# -- without lm-eval -------------------------------------------------------------------------------------------------


def with_answer(overrides: list[str], answer: dict | Exception) -> tuple[dict, dict, str]:
    """On a rank: train where the scores are `answer`, or fail with it.

    Returns the summary, what was asked for, and the lines and tables that were printed.
    """
    asked, printed = {}, []

    def scores(model, tokenizer, tasks, **given):
        asked.update(given, training=model.module.training)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with (
        patch.object(lm_tasks, "missing", lambda field: None),
        patch.object(lm_tasks, "load", lambda *_, **__: {"tasks": {}}),
        patch.object(tasks, "scores", scores),
        patch.object(Terminal, "line", lambda _, text: printed.append(text)),
        patch.object(Terminal, "table", lambda _, *table: printed.append(str(table))),
    ):
        summary = Trainer(check("tiny", [*SHORT, "eval.tasks=[arithmetic]", *overrides])).fit()
    return summary, asked, "\n".join(printed)


def test_scores_are_in_the_summary_the_metrics_and_the_console(tmp_path):
    scores = {"arithmetic": {"acc": 0.25, "acc_stderr": 0.125}}
    store = tmp_path / "store"
    settings = [f"run_dir={tmp_path / 'run'}", f"checkpoint.remote=file://{store}"]
    found = ranks(2).run(with_answer, settings, scores)
    for summary, asked, _ in found:
        assert summary["tasks"] == scores
        assert asked == {"batch_size": 4, "max_length": 63, "of_run": True, "training": False}
    assert summary_of(tmp_path / "run") == summary_of(store) == found[0][0]
    [line] = lines(tmp_path / "run", "tasks")
    assert lines(store, "tasks") == [line]
    assert line["step"] == 12 and line["scores"] == {"arithmetic/acc": 0.25, "arithmetic/acc_stderr": 0.125}
    assert scalars_of("tasks", line)["tasks/arithmetic/acc"] == 0.25
    printed = found[0][2]
    assert "evaluating on arithmetic" in printed and "[['arithmetic', 'acc', '0.2500', '0.1250']]" in printed


@pytest.mark.parametrize("kind", [ValueError, RuntimeError])  # of a task, of torch
def test_tasks_that_fail_leave_a_complete_run(tmp_path, kind):
    run_dir = tmp_path / "run"
    [(summary, _, printed)] = ranks(1).run(with_answer, [f"run_dir={run_dir}"], kind("no such metric"))
    assert "tasks" not in summary and summary == summary_of(run_dir) and (run_dir / "export/config.json").is_file()
    assert status(run_dir)["state"] == "done" and not lines(run_dir, "tasks")
    assert f"warning: eval.tasks: no such metric; `relora eval {run_dir} --tasks arithmetic`" in printed


def test_scores_are_added_to_a_finished_run_only(a_run):
    (a_run / "lock").write_text("process 1 on elsewhere\n")
    before = summary_of(a_run)
    add_scores(a_run, {"a": {"acc": 0.5}, "b": {"acc": 0.25}})
    add_scores(a_run, {"b": {"acc": 0.75}})
    after = summary_of(a_run)
    assert after == {**before, "tasks": {"a": {"acc": 0.5}, "b": {"acc": 0.75}}}
    assert (a_run / "lock").read_text() == "process 1 on elsewhere\n"
    with lock(a_run), pytest.raises(ValueError, match="is being written by process"):
        add_scores(a_run, {"a": {"acc": 1.0}})
    (a_run / "status.json").write_text(json.dumps({**status(a_run), "state": "running"}))
    with pytest.raises(ValueError, match="the run is not finished"):
        add_scores(a_run, {"a": {"acc": 1.0}})
    assert summary_of(a_run) == after


def test_mistakes_in_a_recipe_are_found_before_anything_exists(tmp_path, refused, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for override, message in (
        ("eval.tasks=[none.yaml]", "eval.tasks: none.yaml does not exist; correct the path"),
        ("eval.tasks=[a, a]", "eval.tasks: a is given twice; remove one"),
        ("eval.tasks=hellaswag", "eval.tasks: 'hellaswag' is not a list of names; the default is []"),
        ("eval.tasks=['']", "eval.tasks: '' is empty"),
        ("eval.task_files=none", "eval.task_files: none does not exist"),
    ):
        assert message in refused(tmp_path, f"run_dir={tmp_path / 'run'}", override)
    assert read_recipe("tiny", ["eval.tasks=[]"])[1] == []
    assert any("eval.task_files: " in text for text in warnings(load_recipe("tiny", [f"eval.task_files={tmp_path}"])))


# -- with lm-eval ----------------------------------------------------------------------------------------------------

_QUESTIONS = """
task: {task}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
doc_to_text: "{{{{question}}}}"
{rest}
"""
_CHOICE = """output_type: multiple_choice
doc_to_choice: "{{options}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: brier_score}]"""
_WRITTEN = """output_type: generate_until
doc_to_target: "{{question}}"
generation_kwargs: {until: [never], max_gen_toks: TOKENS, do_sample: true, temperature: 1.0}
metric_list: [{metric: chrf}]"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Task files `text` (one long document), `choice` and `written` (of seven questions), and texts to train on."""
    found = tmp_path_factory.mktemp("tasks")
    text = "\n\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    (found / "training.txt").write_text(text[:200_000])
    (found / "validation.txt").write_text(text[200_000:260_000])
    questions = [
        {"question": f"The value of {'the list in ' * n}it is", "options": [" a", " an" * n + " of", " list"]}
        for n in range(7)
    ]
    (found / "questions.jsonl").write_text("".join(json.dumps({**one, "answer": 1}) + "\n" for one in questions))
    [of_the_guide] = [block for block in fenced(DOCS / "guides/export.md", "yaml") if "output_type:" in block]
    of_the_guide = of_the_guide.replace("/data/validation.txt", f"{found}/validation.txt")
    (found / "text.yaml").write_text(of_the_guide.replace("task: validation_text", "task: text"))
    for task, rest in (
        ("choice", _CHOICE),
        ("written", _WRITTEN.replace("TOKENS", "8")),
        ("endless", _WRITTEN.replace("TOKENS", "63")),
    ):
        (found / f"{task}.yaml").write_text(_QUESTIONS.format(task=task, folder=found, rest=rest))
    return found


@needs_lm_eval
def test_bits_per_byte_of_lm_eval_are_those_of_the_run(folder, tmp_path, capsys):
    run_dir = tmp_path / "run"
    text = ["data.source=text", f"data.path={folder}/training.txt", f"data.validation={folder}/validation.txt"]
    summary = run(run_dir, *text, *SHORT, f"eval.tasks=[{folder}/text.yaml]", world_size=1)
    # One long document in the same windows. lm-eval predicts its first token behind EOS, and no EOS at its end.
    assert summary["tasks"]["text"]["bits_per_byte"] == pytest.approx(summary["bits_per_byte"], rel=1e-3)
    shutil.rmtree(run_dir / "checkpoints")
    assert (
        main(
            [
                "eval",
                str(run_dir),
                "--json",
                "--tasks",
                str(folder / "choice.yaml"),
                "text",
                "--task-files",
                str(folder),
            ]
        )
        == 0
    )
    found = json.loads(capsys.readouterr().out)["tasks"]
    assert found["text"]["bits_per_byte"] == pytest.approx(summary["tasks"]["text"]["bits_per_byte"], rel=1e-6)
    assert summary_of(run_dir) == {**summary, "tasks": {"text": found["text"], "choice": found["choice"]}}
    before = summary_of(run_dir)
    assert main(["eval", str(run_dir), "--json", "--seq-len", "32", "--tasks", str(folder / "choice.yaml")]) == 0
    assert "not added to summary.json: --seq-len 32 is not the run's" in capsys.readouterr().err
    assert summary_of(run_dir) == before
    # with a validation, in 16 bit; an export by itself has no summary
    assert (
        main(
            [
                "eval",
                f"{run_dir}/export",
                "--dtype",
                "bf16",
                "--seq-len",
                "64",
                "--data",
                str(folder / "validation.txt"),
                "--tasks",
                str(folder / "text.yaml"),
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out.splitlines()
    bits = [float(line.split()[-1]) for line in printed if re.match(" .*bits.per.byte", line)]
    assert len(bits) == 2 and bits == pytest.approx([summary["bits_per_byte"]] * 2, rel=2e-3)


@needs_lm_eval
@pytest.mark.parametrize(
    "stage", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_two_ranks_have_the_scores_of_the_export_in_one_process(folder, tmp_path, stage):
    names = ["text", "choice", "written"]
    given = [f"eval.tasks=[{','.join(names)}]", f"eval.task_files={folder}", f"deepspeed=zero{stage}"]
    summary = run(tmp_path / "run", *SHORT, *given)
    export = str(tmp_path / "run" / "export")
    expected = lm_scores.scores(
        model_of(export).eval(),
        tokenizer.load(export),
        lm_tasks.load(names, str(folder)),
        batch_size=4,
        max_length=63,
        of_run=True,
    )
    assert list(summary["tasks"]) == names and summary["tasks"]["written"]["chrf"] > 0
    for name in names:
        assert summary["tasks"][name] == pytest.approx(expected[name], rel=1e-4), name


@needs_lm_eval
def test_tasks_that_cannot_be_loaded_are_refused_in_one_line(folder, tmp_path):
    hub = tmp_path / "hub.yaml"
    hub.write_text("task: hub\ndataset_path: nobody/nothing\noutput_type: loglikelihood_rolling\ntest_split: test\n")
    (tmp_path / "broken.yaml").write_text("task: [")
    (tmp_path / "empty").mkdir()
    for names, files, message in (
        (["none.yaml"], None, "eval.tasks: none.yaml does not exist; correct the path"),
        ([str(hub)], None, "hub.yaml cannot be loaded (Couldn't reach 'nobody/nothing' on the Hub"),
        ([f"{tmp_path}/broken.yaml"], None, "broken.yaml cannot be loaded"),
        (["choice", f"{folder}/choice.yaml"], folder, "eval.tasks: choice is given twice"),
        (["choice"], tmp_path / "empty", "is no directory with task files"),
        (["endless"], folder, "eval.tasks: endless generates up to 63 tokens, which leaves no room"),
    ):
        with pytest.raises(ValueError) as raised:
            lm_tasks.load(names, None if files is None else str(files), 63)
        assert message in str(raised.value) and "\n" not in str(raised.value)


@needs_lm_eval
@pytest.mark.slow  # lm-eval reads all of its own task files
def test_a_name_that_is_misspelled_gets_the_nearest_one(folder):
    with pytest.raises(ValueError) as raised:
        lm_tasks.load(["hellaswagg", "chioce"], str(folder))
    assert "(did you mean hellaswag?)" in str(raised.value) and "(did you mean choice?)" in str(raised.value)
