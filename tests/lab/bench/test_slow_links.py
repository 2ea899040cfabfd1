"""Data parallel and islands over slow links: what is recorded, what becomes of it, and a measurement."""

import argparse
import json
import os
from types import SimpleNamespace

import pytest

from relora_ds.islands import requirement
from relora_ds.lab.bench import island_times, simulated_link, slow_links, step_recorder
from relora_ds.training import preflight
from tests.lab.bench import report

PARALLEL = {
    **{"link": "20mbit", "method": "full", "way": "data parallel", "step_s": 10.0, "waited_s": None},
    **{"restart_s": None, "exchange_s": None, "bytes_an_exchange": None, "bytes_a_restart": None},
    "bytes_a_step": {"formula": 1e6, "kernel": [1.02e6, 1.04e6], "payload": [1e6, 1e6]},
}
ISLAND = {
    **{"link": "20mbit", "method": "full", "way": "islands", "step_s": 0.5, "waited_s": 1.0},
    **{"restart_s": None, "exchange_s": 25.0, "bytes_a_step": None, "bytes_a_restart": None},
    "bytes_an_exchange": {"formula": 2e6, "counted": 2e6, "kernel": [2.02e6, 2.02e6], "payload": [2.002e6, 2.002e6]},
}
LOW_RANK = {**ISLAND, "method": "relora", "exchange_s": 5.0}
RESULT = {
    **{"recipe": "tiny", "overrides": ["model.preset=llama_9m"], "every": 6, "repeats": 3},
    **{"batch_sequences": 8, "seq_len": 64, "tcp": "cubic", "rows": [PARALLEL, ISLAND, LOW_RANK]},
}


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    slow_links.add_arguments(parser)
    return parser.parse_args(arguments)


def test_seconds_are_those_of_steps_and_pauses():
    assert island_times.seconds_to(100, 0.5) == 50 and island_times.seconds_to(100, 0.5, 2, 5.0) == 60
    assert island_times.mean_step(ISLAND, 50) == 1.0 and island_times.mean_step(PARALLEL, 50) == 10.0


def test_the_tables():
    text = slow_links.markdown(RESULT)
    assert "`tiny model.preset=llama_9m`, 8 x 64 tokens a step" in text and "TCP: cubic" in text
    assert "| 20mbit | full | data parallel | 10 s | 1.00 MB | +3.0% (+0.0%) |  |  |  |  |" in text
    assert "| 20mbit | full | islands | 0.5 s |  |  | 25 s | 1 s | 2.00 MB | +1.0% (+0.1%) |" in text
    assert "| 20mbit | full | islands | 1 s (10x, 10x) | 0.625 s (16x, 16x) |" in text
    assert "| 20mbit | relora | islands | 0.6 s (16.7x, –) |" in text  # its data parallel was not measured


def test_the_page_has_the_tables_of_a_record(tmp_path, monkeypatch):
    made = {"device": "CPU", "cores": 2, "threads": 1, "torch": "2"}
    (tmp_path / "benchmarks").mkdir()
    record = {"bench": "islands", "conditions": made, "result": RESULT}
    (tmp_path / "benchmarks/islands.json").write_text(json.dumps(record))
    (tmp_path / "benchmarks.md").write_text("<!-- islands -->\n<!-- end of islands -->\n")
    monkeypatch.setattr(report, "DOCS", tmp_path)
    assert slow_links.markdown(RESULT) in report.filled("benchmarks")


def step(seconds: float, sent: list[int], **more) -> dict:
    return {"step_s": seconds, "sent": sent, "packets": [1, 2], **more}


COST = SimpleNamespace(step=(3.0, 90.0), restart=(1.0, 7.0), exchange=100)


def test_medians_leave_out_the_first_cycle_and_the_steps_with_a_pause():
    def host(seconds: float) -> list[dict]:
        warm = [step(99.0, [99, 99], restart_s=99.0) for _ in range(4)]
        return [*warm, *(step(seconds, [90 + n, 95]) for n in range(3)), step(50.0, [101, 105], restart_s=2.0)]

    found = island_times.summarised([host(1.5), host(1.0)], 4, COST, 10)
    assert found["step_s"] == 1.5 and found["steps_s"] == [[1.5] * 3, [1.0] * 3]
    assert found["restart_s"] == 2.0 and found["exchange_s"] is None
    assert found["bytes_a_step"] == {"formula": 90.0, "kernel": [91, 95], "payload": [81, 75]}
    assert found["bytes_a_restart"] == {"formula": 7.0, "kernel": [10, 10], "payload": [10, 10]}


def test_an_exchange_is_that_of_the_island_across_the_link():
    def host(exchange_s: float) -> list[dict]:
        exchange = {"exchange_s": exchange_s, "waited_s": exchange_s / 4, "bytes_sent": 100}
        return 3 * [*(step(1.0, [0, 0]) for _ in range(3)), step(9.0, [104, 102], exchange=exchange)]

    found = island_times.summarised([host(7.0), host(8.0)], 4, COST, 10)
    assert (found["exchange_s"], found["waited_s"], found["restart_s"]) == (8.0, 2.0, None)
    assert found["bytes_an_exchange"] == {"formula": 100, "counted": 100, "kernel": [104, 102], "payload": [94, 82]}
    assert found["bytes_a_step"] is None


def test_counters_of_the_kernel(tmp_path):
    (tmp_path / "dev").write_text(
        "Inter-|   Receive                                                |  Transmit\n"
        " face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls\n"
        "    lo: 1 2 0 0 0 0 0 0 3 4 0 0 0 0 0 0\n"
        " link0: 5 6 0 0 0 0 0 0 7 8 0 0 0 0 0 0\n"
    )
    with open(tmp_path / "dev") as file:
        assert step_recorder.sent_over("link0", file) == step_recorder.sent_over("link0", file) == [7, 8]
        with pytest.raises(ValueError, match="there is no interface eth0"):
            step_recorder.sent_over("eth0", file)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--links", "1gbit,slow"], "--links: 'slow' is no rate"),
        (["--methods", "full,lora"], "--methods: 'lora' is none; use some of full,relora,one-sided"),
        (["--every", "3"], "--every: 3 leaves no step to measure; use 4 or more"),
        (["method=lora"], "method: this benchmark sets it; leave it out"),
        (["islands.index=1"], "islands.index: this benchmark sets it"),
        (["train.batch_sequences=1", "train.micro_batch_size=1"], "train.batch_sequences: 1 .* into 2 ranks"),
        (["relora.rank=3"], "relora.rank: unknown key"),
        (["islands.compress=int5"], "islands.compress: 'int5' is unknown"),
        (["--recipe", "nothing"], "nothing"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_made(monkeypatch, arguments, why):
    monkeypatch.setattr(slow_links, "SimulatedLink", None)
    with pytest.raises(ValueError, match=why):
        slow_links.run(parsed(*arguments))


def test_what_the_machine_lacks_is_said_first(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ValueError, match="network namespaces need root"):
        slow_links.run(parsed("--methods", "full"))
    monkeypatch.setattr(requirement, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="they need pyzmq"):
        slow_links.run(parsed("--methods", "full"))


@pytest.mark.parametrize("batch", ["train.batch_sequences=16", "train.batch_tokens=1024"])
def test_an_island_has_half_of_the_batch(batch):
    parallel, island = (slow_links._Run("full", way, "tiny", [batch], 6, 3) for way in ("data parallel", "islands"))
    sequences = [
        preflight.resolve("tiny", one._overrides, 2, False).recipe.batch_sequences for one in (parallel, island)
    ]
    assert sequences == [16, 8]


def test_settings_of_islands_are_those_of_islands_alone():
    overrides = ["islands.compress=int8"]
    parallel, island = (slow_links._Run("full", way, "tiny", overrides, 6, 3) for way in ("data parallel", "islands"))
    assert parallel._cost.exchange is None
    none = slow_links._Run("full", "islands", "tiny", [], 6, 3)
    assert island._cost.exchange < 0.3 * none._cost.exchange


@pytest.fixture
def namespaces():
    """Skip where this machine makes none."""
    try:
        with simulated_link.SimulatedLink():
            pass
    except simulated_link.LinkError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_a_measurement_as_a_user_makes_it(namespaces, capsys):
    links = ("1gbit", "20mbit/40ms")
    arguments = ["--links", ",".join(links), "--methods", "one-sided", "--every", "4", "--repeats", "2"]
    result = slow_links.run(parsed(*arguments))
    rows = {(row["link"], row["way"]): row for row in result["rows"]}
    assert len(rows) == 4
    for (link, way), row in rows.items():
        moved = row["bytes_an_exchange"] or row["bytes_a_step"]
        if way == "islands":
            assert moved["counted"] == moved["formula"]
            assert row["exchange_s"] > row["waited_s"] >= 0 and row["restart_s"] is None
        else:
            assert row["restart_s"] > 0 and row["exchange_s"] is None
        # No formula has messages without parameters in them. Where there is delay, packets of 1,500 bytes have headers
        # of 52, and there is an acknowledgement for every second one.
        assert all(moved["formula"] <= sent < 1.04 * moved["formula"] for sent in moved["payload"]), row
        most = 1.04 if link == "1gbit" else 1.04 + 1.5 * 52 / 1448
        assert all(sent < most * moved["formula"] for sent in moved["kernel"]), row
        if link != "1gbit":  # nothing is faster than the link
            assert (row["exchange_s"] or row["step_s"]) > 8 * moved["formula"] / 20e6, row
    parallel, islands = (island_times.mean_step(rows[links[1], way], 500) for way in ("data parallel", "islands"))
    assert islands < parallel
    assert capsys.readouterr().err.count("a step, ") == 4
    assert "| 20mbit/40ms | one-sided | islands |" in slow_links.markdown(result)


@pytest.mark.slow
def test_a_rank_that_fails_is_quoted(namespaces):
    """And the other one is not waited for."""
    with pytest.raises(ValueError, match="islands: full, data parallel: a rank failed\nhost . said: ") as raised:
        slow_links.run(parsed("--links", "1gbit", "--methods", "full", "optim.lr=1e9", "optim.warmup_steps=0"))
    assert "its loss or gradient is not finite; use a smaller optim.lr" in str(raised.value)
