"""Every byte of a step is explained by the sizes of the parameters, for every variant."""

import argparse

import pytest

from relora_ds.lab.bench import bandwidth, launch_local


def bench(*argv: str) -> dict:
    parser = argparse.ArgumentParser()
    bandwidth.add_arguments(parser)
    # In fp32 the smallest parameter of this shape, a norm's weight, is no smaller than the largest control message.
    return bandwidth.run(
        parser.parse_args(["--preset", "llama_20m", "--vocab-size", "1000", "--r", "8", "--precision", "fp32", *argv])
    )


@pytest.mark.slow  # ranks are started for every line of the table; tests/zero/test_traffic.py has ours
@pytest.mark.parametrize(
    "argv",
    [
        ("--stages", "1", "3", "--accumulation", "2"),
        ("--stages", "0", "2", "--accumulation", "1", "4"),
        ("--stages", "3", "--accumulation", "1", "--ranks", "3"),
    ],
    ids=" ".join,
)
def test_nothing_is_unexplained(argv):
    result = bench(
        *argv,
        "--variants",
        "full rank",
        "PEFT, its default",
        "PEFT, same modules train",
        "ours, LoRA alone",
        "ours, dense",
        "ours, int8",
        "CoLA",
        "CR-Net",
        "Muon",
        "SCALE",
        "SST",
    )
    assert {row["variant"] for row in result["rows"]} >= {"full rank", "PEFT, its default", "ours, int8"}
    for row in result["rows"]:
        assert row["counted"] == row["expected"], row
        assert row["control"] < 4096, row
    table = bandwidth.markdown(result)
    assert table.count("| 0 B |") == len(result["rows"])
    by = {(row["variant"], row["stage"], row["placement"]): row["wire"] for row in result["rows"]}
    if any(row["stage"] == 1 for row in result["rows"]):
        assert by["ours, LoRA alone", 1, "auto"] == by["PEFT, its default", 1, "auto"]
        assert by["ours, dense", 1, "auto"] == by["PEFT, same modules train", 1, "auto"] < by["full rank", 1, "auto"]


@pytest.mark.slow
def test_pefts_step_and_ours_send_the_same_bytes():
    result = bench("--stages", "1", "--accumulation", "2", "--variants", "PEFT, same modules train", "ours, dense")
    pefts, ours = sorted(result["rows"], key=lambda row: row["variant"])
    assert pefts["counted"] == pefts["expected"] and ours["counted"] == ours["expected"]
    assert pefts["wire"] == ours["wire"]


@pytest.mark.parametrize(
    ("argv", "words"), [(("--vocab-size", "0"), "data.vocab_size"), (("--preset", "nosuch"), "model.preset")]
)
def test_what_cannot_be_is_known_before_a_rank_starts(monkeypatch, argv, words):
    monkeypatch.setattr(bandwidth, "launch_local", lambda *_: pytest.fail("ranks were started"))
    with pytest.raises(ValueError, match=words):
        bench(*argv)


def test_ranks_that_fail():
    with pytest.raises(ValueError, match="no_such_module: the ranks failed"):
        launch_local.launch_local("no_such_module", argparse.Namespace(), 1)
