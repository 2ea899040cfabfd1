"""Tasks of lm-eval: what each rank computes of them, their names and numbers. lm-eval itself need not be installed."""

import importlib
import sys
import types
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from relora_ds.__main__ import main
from relora_ds.interop import lm_scores, lm_tasks
from tests.ranks import ranks


def requests(count: int) -> list:
    """Requests of several lengths, of which some share all but the last token."""
    context = [(7 * number) % 5 * [1, 2] + [number // 3] for number in range(count)]
    return [(None, context[number - number % 3], [number % 3 or 9]) for number in range(count)]


class Wrapper:
    """In place of lm-eval's: answers with the tokens, and counts forwards as it does, a row for those that share it."""

    def __init__(self, model, *, tokenizer, batch_size, prefix_token_id, add_bos_token, softmax_dtype, **_):
        assert softmax_dtype is torch.float32
        self.batch_size_per_gpu, self.num_rows, self.batches = batch_size, 0, []
        self.begins = prefix_token_id, add_bos_token

    @property
    def batch_size(self):
        return self.batch_size_per_gpu

    def loglikelihood_rolling(self, windows, disable_tqdm=False):
        found = []
        for start in range(0, len(windows), self.batch_size):
            self.batches.append(self.batch_size)
            found += self._loglikelihood_tokens(windows[start : start + self.batch_size])
        return found

    def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
        self.num_rows += len({(*context, *continuation[:-1]) for _, context, continuation in requests})
        return [(float(sum(context) + 100 * sum(continuation)), True) for _, context, continuation in requests]


class Tokenizer:
    bos_token_id, eos_token_id = 1, 2

    def __init__(self, adds_bos: bool):
        self._first = [self.bos_token_id] if adds_bos else []

    def __call__(self, text: str) -> dict:
        return {"input_ids": [*self._first, 50]}


def network(adds_bos: bool = False, of_run: bool = True):
    """A SharedNetwork over `Wrapper`, whether lm-eval is installed or not."""
    stubs = {name: types.ModuleType(name) for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface")}
    stubs["lm_eval.models.huggingface"].HFLM = Wrapper
    with patch.dict(sys.modules, stubs):  # which also forgets what is imported now
        sys.modules.pop("relora_ds.interop.lm_network", None)
        module = importlib.import_module("relora_ds.interop.lm_network")
    model = types.SimpleNamespace(device="cpu", config=None)
    return module.SharedNetwork(model, Tokenizer(adds_bos), batch_size=2, max_length=None, of_run=of_run)


def answers(count: int) -> tuple[list, list, list[int]]:
    """On a rank: (answers to requests, to the same in windows, what the ranks computed)."""
    one = network()
    whole, rolled = one._loglikelihood_tokens(requests(count)), one.loglikelihood_rolling(requests(count))
    assert one.batch_size == 2 and set(one.batches) == {2 * dist.get_world_size()}
    everyones = [0] * dist.get_world_size()
    dist.all_gather_object(everyones, one.num_rows)
    return whole, rolled, everyones


@pytest.mark.parametrize("count", [1, 2, 7, 30])
def test_ranks_divide_the_requests_run_as_many_forwards_each_and_have_all_answers(count):
    alone = network()
    expected = alone._loglikelihood_tokens(requests(count))
    found = ranks(2).run(answers, count)
    for whole, rolled, rows in found:
        assert whole == rolled == expected
        assert rows[0] == rows[1] < alone.num_rows + 2 * (1 + count // 4)  # twice: whole and in windows
    if count == 30:
        assert rows[0] < 0.75 * 2 * alone.num_rows


def test_a_text_begins_as_in_training_or_as_its_tokenizer_has_it():
    assert network().begins == network(adds_bos=True).begins == (Tokenizer.eos_token_id, False)
    assert network(of_run=False).begins == (Tokenizer.eos_token_id, None)
    assert network(adds_bos=True, of_run=False).begins == (None, None)  # lm-eval's own choice: BOS


def test_scores_have_plain_names_and_rows():
    metrics = lm_scores._metrics(
        {
            "alias": "a",
            "sample_len": 7,
            "acc,none": 0.25,
            "acc_stderr,none": 0.1,
            "ppl,none": 9,
            "ppl_stderr,none": "N/A",
        }
        | {"exact_match,strict": 0.5, "exact_match_stderr,strict": 0.2}
    )
    assert metrics == {
        **{"acc": 0.25, "acc_stderr": 0.1, "ppl": 9.0},
        **{"exact_match/strict": 0.5, "exact_match_stderr/strict": 0.2},
    }
    assert lm_scores.rows_of({"mine": metrics}) == [
        ["mine", "acc", "0.2500", "0.1000"],
        ["mine", "ppl", "9.0000", ""],
        ["mine", "exact_match/strict", "0.5000", "0.2000"],
    ]


def test_where_lm_eval_is_missing_one_line_names_the_extra(monkeypatch, tmp_path, capfd):
    monkeypatch.setattr(lm_tasks, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"^--tasks: lm-eval, .* is not installed; pip install '\.\[tasks\]'$"):
        lm_tasks.load(["hellaswag"], field="--tasks")
    run_dir = tmp_path / "run"
    assert main(["train", "tiny", f"run_dir={run_dir}", "eval.tasks=[hellaswag]"]) == 2
    printed = capfd.readouterr().err
    assert "eval.tasks: lm-eval, " in printed and "pip install '.[tasks]'" in printed and "Traceback" not in printed
    assert not run_dir.exists()
