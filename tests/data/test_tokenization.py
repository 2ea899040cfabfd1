"""A tokenization that is killed goes on where it was, and nobody can tell from the tokens."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from relora_ds.data import prepare, tokenization
from relora_ds.data import tokenizer as tokenizers
from tests.data.settings import settings

PIECE, BATCH = 100_000, 20_000  # characters
CHILD = """
import sys
import time
from pathlib import Path
from relora_ds.data import prepare, tokenization
from tests.data.settings import settings
tokenization.PIECE_CHARACTERS, tokenization.BATCH_CHARACTERS = {piece}, {batch}
commit = tokenization.Progress.commit

def and_wait(progress, directory):
    commit(progress, directory)
    time.sleep(600 * (progress.train.tokens > 0))  # to be killed

tokenization.Progress.commit = and_wait
prepare(settings(Path(sys.argv[1]), source="text", path=sys.argv[2], vocab_size=600))
"""


def corpus(tmp_path, num_documents=9_000):
    path = tmp_path / "corpus.jsonl"
    with open(path, "w") as file:
        for number in range(num_documents):
            text = f"document {number}: the {number * 7919 % 10007:x}th hill\n" * (1 + number % 5)
            file.write(json.dumps({"text": text}) + "\n")
    return path


def kill_in_the_middle(cache, path):
    """Start a tokenization and kill it with signal 9 after its first piece; the directory that it leaves."""
    code = CHILD.format(piece=PIECE, batch=BATCH)
    child = subprocess.Popen([sys.executable, "-c", code, str(cache), str(path)])
    try:
        deadline = time.monotonic() + 300
        while child.poll() is None and time.monotonic() < deadline:
            for partial in (cache / "tokens").glob(".*.partial"):
                if tokenization.progress_of(partial, "").train.tokens > 0:
                    os.kill(child.pid, signal.SIGKILL)
                    assert child.wait() == -signal.SIGKILL
                    return partial
            time.sleep(0.005)
        raise AssertionError("the tokenization ended before it could be killed")
    finally:
        child.kill()
        child.wait()


def test_kill_9_loses_a_piece_and_changes_no_byte(tmp_path, monkeypatch):
    path = corpus(tmp_path)
    partial = kill_in_the_middle(tmp_path / "killed", path)
    committed = tokenization.progress_of(partial, "").train
    assert 0 < committed.documents < 8_000 and not committed.is_done
    with open(partial / "train.bin", "ab") as file:  # what it wrote and did not commit
        file.write(b"\xff" * 1001)

    encoded = []
    encode = tokenizers.encode
    monkeypatch.setattr(tokenizers, "encode", lambda given, texts: encoded.append(len(texts)) or encode(given, texts))
    data = {"source": "text", "path": str(path), "vocab_size": 600}
    resumed = prepare(settings(tmp_path / "killed", **data))
    assert sum(encoded) <= 9_000 - committed.documents + 500, "it must not start from the beginning"
    monkeypatch.undo()
    whole = prepare(settings(tmp_path / "whole", **data))
    assert resumed.fingerprint == whole.fingerprint
    for name in ("train.bin", "validation.bin", "tokenizer/tokenizer.model", "metadata.json"):
        assert (resumed.directory / name).read_bytes() == (whole.directory / name).read_bytes(), name
    assert not (resumed.directory / "progress.json").exists() and not partial.exists()


@pytest.mark.parametrize("piece", [1, 30_000])
def test_every_place_can_be_gone_on_from(tmp_path, monkeypatch, piece):
    """Fails after each number of batches in turn, also inside the validation split."""
    path = corpus(tmp_path, 1500)
    data = {"source": "text", "path": str(path), "vocab_size": 400, "validation": 0.3}
    whole = prepare(settings(tmp_path / "whole", **data))
    monkeypatch.setattr(tokenization, "PIECE_CHARACTERS", piece)
    monkeypatch.setattr(tokenization, "BATCH_CHARACTERS", 10_000)
    encode, calls = tokenizers.encode, []

    def failing(given, texts):
        calls.append(1)
        if len(texts) > 7 and len(calls) % 7 == 6:  # not the samples that a new tokenizer is verified with
            raise OSError("disk full")
        return encode(given, texts)

    monkeypatch.setattr(tokenizers, "encode", failing)
    num_failures, resumed = 0, None
    while resumed is None and num_failures < 100:
        try:
            resumed = prepare(settings(tmp_path / "failing", **data))
        except OSError:
            num_failures += 1
    assert num_failures >= 2
    for split in ("train", "validation"):
        np.testing.assert_array_equal(getattr(resumed, split), getattr(whole, split))
    assert resumed.validation_words == whole.validation_words


def test_pieces_of_another_revision_are_thrown_away(tmp_path):
    tokenization.Progress("old", {}, tokenization.SplitProgress(tokens=5)).commit(tmp_path)
    assert tokenization.progress_of(tmp_path, "old").train.tokens == 5
    assert tokenization.progress_of(tmp_path, "new") == tokenization.Progress("new")
    (tmp_path / "progress.json").write_text("{")
    assert tokenization.progress_of(tmp_path, "old") == tokenization.Progress("old")


def test_the_threads_of_the_tokenizer_are_used_and_the_environment_left_alone(tmp_path, monkeypatch):
    """Each thread's CPU time: with `TOKENIZERS_PARALLELISM=false` outside, several must have worked inside."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    given = tokenizers.load(prepare(settings(tmp_path)).tokenizer_dir)
    texts = ["The quick brown fox jumps over the lazy dog; naïve façade.\n" * 2000] * 16
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    before = ticks_of_threads()
    with tokenization._all_cores():
        tokenizers.encode(given, texts)
    assert os.environ["TOKENIZERS_PARALLELISM"] == "false"
    spent = {thread: ticks - before.get(thread, 0) for thread, ticks in ticks_of_threads().items()}
    assert sum(ticks > 0 for ticks in spent.values()) >= 2, spent


def ticks_of_threads():
    """{thread: clock ticks of CPU time in user mode} of this process."""
    return {
        stat.parent.name: int(stat.read_text().rsplit(")", 1)[1].split()[11])
        for stat in Path("/proc/self/task").glob("*/stat")
    }
