"""A full disk, a directory that was moved, a damaged file that is not the weights: a warning, and never the run."""

import errno
import io
import json
import resource
import shutil
import time
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.summary.writer.record_writer import RecordWriter

from relora_ds.checkpoint.find import _stray
from relora_ds.checkpoint.run_files import read_json, read_metrics
from relora_ds.config import Recipe
from relora_ds.interop.hf_export import export
from relora_ds.interop.sources import find_checkpoint, is_finished
from relora_ds.lab.figures.run_history import method_text, read_runs
from relora_ds.training import metrics_log
from relora_ds.training.hooks.loggers import logger
from relora_ds.training.hooks.loggers.tensorboard import TensorBoard
from relora_ds.training.metrics_log import MetricsLog
from relora_ds.training.terminal import Terminal
from tests.training.runs import lines, losses, run, status

SETTINGS = ("train.steps=14", "checkpoint.every=6", "checkpoint.keep_last=99")
GARBAGE = bytes(range(128, 256))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "whole"
    run(directory, *SETTINGS)
    return directory


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "r")


def log_in(directory: Path) -> MetricsLog:
    return MetricsLog(directory, loggers=[TensorBoard(Recipe(), directory, None)])


def write(log: MetricsLog, step: int) -> None:
    log.write("train", step=step, t=step, phase="relora", loss=1.0)


def wait_for(is_so) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.01)


# -- a full disk ------------------------------------------------------------------------------------------------------


def test_lines_that_found_no_space_are_written_later(tmp_path, caplog):
    log, path = log_in(tmp_path), tmp_path / "metrics.jsonl"
    write(log, 1)
    path.rename(tmp_path / "away")
    path.symlink_to("/dev/full")
    for step in (2, 3):
        write(log, step)
    assert caplog.text.count("metrics.jsonl lacks the newest lines: No space left on device") == 2
    path.unlink()
    (tmp_path / "away").rename(path)
    write(log, 4)
    log.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_of_a_line_that_fits_in_part_nothing_stays(tmp_path):
    path, limits = tmp_path / "metrics.jsonl", resource.getrlimit(resource.RLIMIT_FSIZE)
    metrics_log._append(path, b"first\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]))
    try:
        with pytest.raises(OSError, match="No space left"):
            metrics_log._append(path, b"second\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == b"first\n"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # its thread says what it raises
def test_tensorboards_writer_that_failed_is_replaced(tmp_path, caplog, monkeypatch):
    """Its thread fails, and every later call would raise."""
    monkeypatch.setattr(logger, "RETRY_S", 0)
    log = log_in(tmp_path)
    log.text("recipe", "text", 0)
    log._loggers[0]._target.flush()
    shutil.move(tmp_path / "tensorboard", tmp_path / "moved")
    (tmp_path / "tensorboard").write_text("in its way")
    thread = log._loggers[0]._target.file_writer.event_writer._async_writer._worker
    thread._next_flush_time = 0  # it writes at once, not in two minutes
    write(log, 1)
    wait_for(lambda: not thread.is_alive())
    for step in (2, 3):
        write(log, step)
        log.text("samples", "text", step)
    assert "TensorBoard lacks events" in caplog.text
    (tmp_path / "tensorboard").unlink()
    write(log, 4)
    log.close()
    assert any((tmp_path / "tensorboard").iterdir())
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_tensorboards_events_are_on_disk_when_they_are_logged(tmp_path, monkeypatch):
    """Its thread opens the file by name: what it wrote later would go to the run that has the directory by then."""
    write = RecordWriter.write

    def slowly(self, event):
        time.sleep(0.2)
        write(self, event)

    monkeypatch.setattr(RecordWriter, "write", slowly)
    board = TensorBoard(Recipe(), tmp_path, None)
    for log in (lambda: board.scalars({"loss/train": 1.0}, 1), lambda: board.text("recipe", "x", 1)):
        log()
        shutil.move(tmp_path / "tensorboard", tmp_path / "moved")
        (tmp_path / "tensorboard").mkdir()
        time.sleep(0.5)
        (tmp_path / "tensorboard").rmdir()  # it is empty
        shutil.move(tmp_path / "moved", tmp_path / "tensorboard")
    board.close()


def test_tensorboards_writer_that_cannot_close_does_not_matter(tmp_path, caplog):
    log = log_in(tmp_path)
    write(log, 1)
    log._loggers[0]._target.close = lambda: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device"))
    log.close()
    assert "TensorBoard lacks events (metrics.jsonl has the numbers): No space left on device" in caplog.text


def test_a_console_on_a_full_disk_is_silent():
    view = Terminal.__new__(Terminal)  # its own beginning sets up the logging of the whole process
    view._warned, view._bar = set(), None
    with open("/dev/full", "wb", buffering=0) as full:
        view.console = Console(file=io.TextIOWrapper(full, write_through=True))
        view.line("text")
        view.warn("text")
        view.table("title", ["a"], [["b"]])
        view.step(1, 10, "relora", "", True)


# -- damaged files ----------------------------------------------------------------------------------------------------

DAMAGED_LINES = b"\n".join(
    [
        b"null",
        b"[]",
        b"3",
        b'"x"',
        b'{"kind": "train"}',
        b'{"kind": "eval", "step": 12, "phase": "r"}',
        b'{"kind": "train", "step": "x", "phase": "r"}',
        b'{"step": 1e999, "kind": "eval", "phase": "r"}',
        b"[" * 100_000,
        GARBAGE,
        b"",
    ]
)


def test_damaged_lines_are_left_out_with_a_warning(tmp_path, caplog):
    good = b'{"kind": "train", "step": 1, "t": 1, "phase": "r", "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_bytes(DAMAGED_LINES + good + b'{"kind": "tra')
    assert [line["step"] for line in read_metrics(tmp_path)] == [12, 1]
    assert "metrics.jsonl: 9 damaged lines are left out" in caplog.text


@pytest.mark.parametrize("content", [GARBAGE, b"null", b"[1]", b"", b"{", b"[" * 100_000])
def test_damaged_json_is_unknown(tmp_path, caplog, content):
    (tmp_path / "status.json").write_bytes(content)
    assert read_json(tmp_path / "status.json") == {}
    assert "status.json cannot be read" in caplog.text
    assert read_json(tmp_path / "summary.json") == {}


def damage_small_files(directory: Path) -> None:
    with (directory / "metrics.jsonl").open("ab") as file:
        file.write(DAMAGED_LINES)
    for name in (
        "status.json",
        "summary.json",
        "recipe.yaml",
        "checkpoints/latest",
        "checkpoints/tokenizer/tokenizer_config.json",
        "checkpoints/tokenizer/tokenizer.json",
    ):
        (directory / name).write_bytes(GARBAGE)
    for path in (directory / "tensorboard").iterdir():
        path.write_bytes(GARBAGE)


def test_a_run_whose_small_files_are_damaged_goes_on(copy, whole):
    """From its checkpoint in the middle, so that there is something to train."""
    for step in (12, 14):
        shutil.rmtree(copy / "checkpoints" / f"step_{step:08d}")
    damage_small_files(copy)
    run(copy, *SETTINGS, "resume=auto")
    assert losses(copy) == losses(whole) and len(lines(copy, "eval")) == len(lines(whole, "eval"))
    assert status(copy)["state"] == "done"
    assert (copy / "checkpoints" / "latest").read_text() == "step_00000014"
    assert json.loads((copy / "summary.json").read_text())["step"] == 14


def test_what_reads_a_run_whose_small_files_are_damaged(copy, caplog):
    damage_small_files(copy)
    (read,) = read_runs([copy])
    assert (read.state, read.verdict, read.method) == ("unknown", "", "unknown")
    assert method_text(copy) == "unknown" and "recipe.yaml is not a readable YAML recipe" in caplog.text
    assert is_finished(copy)
    assert find_checkpoint(copy).name == "step_00000014"


def test_an_export_where_what_is_beside_the_weights_is_damaged(copy, whole, tmp_path, caplog):
    tag = copy / "checkpoints" / "step_00000012"
    for name in ("config.json", "generation_config.json"):  # the second one is no part of this checkpoint
        (tag / name).write_bytes(GARBAGE)
    damage_small_files(copy)
    for source, out in ((copy, "out"), (whole, "expected")):
        export(source, tmp_path / out, checkpoint=tag.name)
    assert "the tokenizer beside the checkpoint cannot be used" in caplog.text and "config.json has " in caplog.text
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "expected" / name).read_bytes()


def away(directory: Path, latest: Path) -> None:
    latest.write_text("../elsewhere")


def absolute(directory: Path, latest: Path) -> None:
    latest.write_text(str(directory.parent / "elsewhere"))


def link(directory: Path, latest: Path) -> None:
    (directory / "step_link").symlink_to(directory.parent / "elsewhere")
    latest.write_text("step_link")


def one_bad_byte(directory: Path, latest: Path) -> None:
    latest.write_bytes(b"step_000000\xff4")


def itself_a_link(directory: Path, latest: Path) -> None:
    latest.unlink()
    latest.symlink_to("/etc/passwd")


@pytest.mark.parametrize("damage", [away, absolute, link, one_bad_byte, itself_a_link])
def test_latest_never_matters(copy, damage):
    directory = copy / "checkpoints"
    shutil.copytree(directory / "step_00000006", copy / "elsewhere")
    damage(directory, directory / "latest")
    assert find_checkpoint(copy) == directory / "step_00000014"
    warnings = _stray(directory)
    assert len(warnings) == 1 and "root:" not in str(warnings)
    with pytest.raises(ValueError, match="is not in"):
        find_checkpoint(copy, "../elsewhere")
