"""Hosts that tokenized different data do not train together."""

import os
import subprocess
import sys

import numpy as np
import pytest

from relora_ds.config import RecipeError
from relora_ds.data import prepare
from relora_ds.data.check_same_data import require_same_tokens
from relora_ds.data.preparation import NamedTokens
from tests.data.settings import settings, write_text
from tests.ranks import ranks


def compare(fingerprints: list[str]) -> str:
    """On a rank: what is raised."""
    import torch.distributed as dist

    try:
        require_same_tokens(fingerprints[dist.get_rank()])
    except RecipeError as error:
        return str(error)
    return ""


def test_the_same_data_pass_and_other_data_are_named_on_every_rank():
    assert ranks(2).run(compare, ["a" * 64, "a" * 64]) == ["", ""]
    first, second = ranks(2).run(compare, ["a" * 64, "b" * 64])
    assert first == second
    for words in ("(rank 0): " + "a" * 16, "(rank 1): " + "b" * 16, "data.source=pretokenized", "prepare"):
        assert words in first


def compare_sets(sets: list[np.ndarray]) -> str:
    """On a rank: what is raised where the training data are the same."""
    import torch.distributed as dist

    try:
        require_same_tokens("a" * 64, [NamedTokens("more", sets[dist.get_rank()])])
    except RecipeError as error:
        return str(error)
    return ""


def test_hosts_with_other_validation_sets_are_refused():
    """Each rank evaluates a part: their losses would be added up as if they were of one text."""
    one, other = np.arange(9, dtype=np.uint16), np.arange(1, 10, dtype=np.uint16)
    assert ranks(2).run(compare_sets, [one, one.copy()]) == ["", ""]
    first, second = ranks(2).run(compare_sets, [one, other])
    assert first == second and "data.validation_sets: the ranks have tokenized different texts" in first
    assert "(rank 0): " in first and "data.source" not in first


def test_the_fingerprint_is_that_of_the_tokens(tmp_path):
    """Of another cache the same, of another text another."""
    text = write_text(tmp_path / "a.txt", 300)
    data = {"source": "text", "path": str(text), "vocab_size": 300}
    first = prepare(settings(tmp_path / "one", **data)).fingerprint
    text.touch()
    assert prepare(settings(tmp_path / "two", **data)).fingerprint == first
    text.write_text(text.read_text().replace("word 7 ", "word 8 "))
    assert prepare(settings(tmp_path / "two", **data)).fingerprint != first


@pytest.mark.slow
def test_a_run_ends_with_exit_code_2_before_it_begins(tmp_path):
    """Two ranks as of two hosts, each with a cache and a text of its own."""
    processes = []
    for rank in range(2):
        write_text(tmp_path / str(rank) / "a.txt", 900, word=f"word{rank}")
        environment = os.environ | {
            "RANK": str(rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29617",
            "RELORA_DS_CACHE": str(tmp_path / str(rank) / "cache"),
        }
        processes.append(
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "relora_ds",
                    "train",
                    "--config",
                    "tiny",
                    f"run_dir={tmp_path / 'run'}",
                    "data.source=text",
                    f"data.path={tmp_path / str(rank) / 'a.txt'}",
                    "data.vocab_size=300",
                ],
                env=environment,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    errors = [process.communicate(timeout=200)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], errors
    assert "the ranks have tokenized different data" in errors[0]
    assert not (tmp_path / "run").exists()
