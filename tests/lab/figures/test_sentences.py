"""What a run's files say, in sentences."""

import json

from relora_ds.lab.figures.run_history import read_runs
from relora_ds.lab.figures.sentences import sentences
from tests.lab.figures.runs import write_run


def told(*args, **how) -> list[str]:
    return sentences(read_runs([write_run(*args, **how)])[0])


def test_a_finished_run_says_what_it_learned_and_sent(tmp_path):
    lines = [json.loads(line) for line in (write_run(tmp_path / "mine") / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    first, *_, last = (line for line in lines if line["kind"] == "eval")
    (run,) = read_runs([tmp_path / "mine"])
    assert sentences(run) == [
        "mine: relora, 200 steps, 12.80k tokens, done",
        f"The training loss went from {losses[0]:.2f} at step 1 to {losses[-1]:.2f} at step 200.",
        f"The validation loss went from {first['val_loss']:.2f} at step 40 to {last['val_loss']:.2f} at step 200. "
        f"The perplexity went from {2.718281828 ** first['val_loss']:.2f} to {2.718281828 ** last['val_loss']:.2f}, "
        f"that is {last['bits_per_byte']:.3f} bits per byte.",
        "600 of 1.20k parameters (50 %) trained after step 40. In these steps each rank sent 80.00 kB, 50 % of the "
        "160.00 kB that full rank would have sent.",
        'It continues "a <b>" with "& c".',
    ]


def test_what_is_not_known_is_left_out(tmp_path):
    """A run that has just begun on one rank: one logged step, no evaluation, nothing sent."""
    state, loss, trained = told(tmp_path / "r", steps=1, world_size=1, state="running")
    assert state == "r: relora, 1 step, 64 tokens, running"
    assert loss.startswith("The training loss is ") and loss.endswith(" at step 1.")
    assert trained == "1.00k of 1.00k parameters (100 %) trained."


def test_a_run_that_failed_says_why(tmp_path):
    assert told(tmp_path / "r", state="failed", reason="out of memory")[0].endswith("tokens, failed: out of memory")
    (tmp_path / "r" / "status.json").unlink()
    assert sentences(read_runs([tmp_path / "r"])[0])[0] == "r: relora, 200 steps, 12.80k tokens"


def test_losses_that_are_not_finite_are_said(tmp_path):
    path = write_run(tmp_path / "r") / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        if line["step"] == 200:
            line |= {key: None for key in ("loss", "val_loss", "bits_per_byte") if key in line}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, training, validation, *_ = sentences(read_runs([tmp_path / "r"])[0])
    assert training.endswith("to nan at step 200.") and "to nan at step 200. The perplexity" in validation
    assert "bits per byte" not in validation


def test_a_sample_cannot_command_the_terminal(tmp_path):
    path = write_run(tmp_path / "r") / "metrics.jsonl"
    path.write_text(path.read_text().replace(" & c", "one\\u001b[2J\\n two"))
    assert sentences(read_runs([tmp_path / "r"])[0])[-1] == 'It continues "a <b>" with "one [2J two".'
