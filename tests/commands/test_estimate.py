"""`estimate`: a row for each stage and world size."""

import json
import re

import pytest

from relora_ds.__main__ import main
from relora_ds.commands.estimate import _methods as compared
from relora_ds.config import load_recipe
from relora_ds.planning import cost
from tests.planning.engines import overrides, planned


@pytest.fixture(scope="module")
def traced() -> dict:
    """Bytes of activations by what they depend on."""
    return {}


@pytest.fixture(autouse=True)
def traced_once(monkeypatch, traced):
    """Trace each network once in these tests: it takes seconds, and numbers of ranks do not change it."""
    trace = cost.activations_of

    def remembered(resolved, method, config, *more):
        of = repr((resolved.recipe, resolved.precision, resolved.stage, method.name, *more))
        if of not in traced:
            traced[of] = trace(resolved, method, config, *more)
        return traced[of]

    monkeypatch.setattr(cost, "activations_of", remembered)


def estimate(capsys, *arguments: str) -> tuple[int, str]:
    code = main(["estimate", *arguments])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_json_holds_what_the_account_says(capsys):
    changes = overrides(1, "bf16", "relora")
    code, text = estimate(capsys, "tiny", *changes, "--world-size", "2", "--json")
    assert code == 0
    found = {(e["stage"], e["method"]): e for e in json.loads(text)["estimates"]}
    assert len(found) == 8
    expected = planned(changes)
    entry = found[1, "relora"]
    assert entry["items"] == [vars(item) for item in expected.items]
    assert (entry["step_payload_bytes"], entry["step_wire_bytes"]) == expected.step
    assert entry["trainable"] == expected.shapes.num_trainable
    for stage in range(4):
        low, full = found[stage, "relora"], found[stage, "full"]
        assert low["step_wire_bytes"] < full["step_wire_bytes"] and low["peak_device_bytes"] < full["peak_device_bytes"]


def test_the_table(capsys):
    code, text = estimate(capsys, "quickstart", "--world-size", "1", "3", "--stages", "1", "3")
    assert code == 0
    for table in text.split("memory of a host"):
        rows = [line.split()[:2] for line in table.splitlines() if line.startswith(("  1 ", "  3 "))]
        assert rows == [["1", "1"], ["1", "3"], ["3", "1"], ["3", "3"]]
    assert "cannot be split into micro-batches of 8 over 3 ranks" in text and "full: state" in text


def test_the_memory_of_a_host(capsys):
    changes = ["llama_1b_relora", "data.tokenizer=null", "data.vocab_size=32000", "precision=bf16"]
    code, text = estimate(capsys, *changes, "--world-size", "1", "8", "16", "--stages", "1", "3", "--json")
    assert code == 0
    entries = [entry for entry in json.loads(text)["estimates"] if entry["method"] == "relora"]
    for entry in entries:
        frozen, trains = entry["frozen"], entry["trainable"]
        host, hosts = entry["host_bytes"], -(-entry["world_size"] // 8)
        assert host["kept"] == pytest.approx(4 * frozen / hosts, rel=0.03)  # masters, once over all ranks
        ranks, embedding = min(8, entry["world_size"]), 32_000 * 2048
        assert host["build"] - host["kept"] == ranks * 4 * embedding
        plain = frozen + 2 * embedding + 49 * 2048
        assert host["switch"] - host["build"] == pytest.approx(4 * plain / hosts, rel=1e-6)
        assert host["checkpoint"] - host["kept"] == pytest.approx(12 * trains / hosts, rel=1e-6)
        assert host["restart"] - host["checkpoint"] == pytest.approx(host["kept"], rel=0.02)
    _, text = estimate(capsys, *changes, "--world-size", "16", "--stages", "1", "--ranks-per-host", "4")
    (row,) = (line.split() for line in text.split("memory of a host")[1].splitlines() if line.startswith("  1 "))
    assert row[:4] == ["1", "16", "1.23", "GB"]  # of 4 of the 16 ranks
    assert "build  phase transition  restart" in re.sub(" {3,}", "  ", text)


def test_clusters(capsys):
    code, text = estimate(
        capsys,
        "tiny",
        "--world-size",
        "1",
        "--stages",
        "0",
        "1",
        "--cluster",
        "1x2",
        "4x2",
        "--network",
        "0.1",
        "10",
        "--json",
    )
    found = {(e["method"], e["stage"], e["nodes"], e["network_gbits"]): e for e in json.loads(text)["clusters"]}
    assert code == 0 and len(found) == 2 * 2 * (1 + 2)
    for (method, stage, nodes, gbits), entry in found.items():
        assert entry["seconds"] == pytest.approx(entry["compute"] + entry["communication"])
        assert entry["tokens_per_s"] == pytest.approx(8 * 64 / entry["seconds"])  # the recipe's batch, whole
        if method == "relora":
            assert entry["seconds"] < found["full", stage, nodes, gbits]["seconds"]
    slow, fast = (found["full", 1, 4, gbits] for gbits in (0.1, 10))
    # Two runs of one wire differ by its bandwidth alone.
    assert slow["communication"] - fast["communication"] == pytest.approx(slow["wire_bytes"] * 8 * (1e-8 - 1e-10))
    assert found["full", 0, 4, 0.1]["wire_bytes"] < slow["wire_bytes"]


def test_the_table_of_clusters(capsys):
    code, text = estimate(capsys, "tiny", "--world-size", "1", "--stages", "1", "--cluster", "2x1", "--network", "1")
    row = next(line.split() for line in text.splitlines() if line.split()[:1] == ["2x1"])
    assert code == 0 and row[1:5] == ["1", "Gbit/s", "1", "8"] and row[-1].endswith("x")
    assert "predicted, not measured" in text


ISLANDS = ("islands.count=3", "islands.address=host:5555", "islands.sync_every=5", "islands.compress=int4")


def test_islands_on_clusters(capsys):
    arguments = ("--world-size", "1", "--stages", "1", "--cluster", "1x2", "--outside", "0.01", "1", "--json")
    code, text = estimate(capsys, "tiny", *ISLANDS, *arguments)
    found = json.loads(text)
    sent = {entry["method"]: entry["exchange_bytes"] for entry in found["estimates"]}
    assert code == 0 and len(found["clusters"]) == 2
    for entry in found["clusters"]:
        slow, fast = entry["islands"]
        every = 5 if entry["method"] == "full" else 10  # the recipe's restarts
        assert slow["every"] == every and slow["exchange_bytes"] == sent[entry["method"]]
        assert slow["exchange"] == pytest.approx(3 * slow["exchange_bytes"] * 8 / 1e7 + 2 * 9 * 0.025)
        assert slow["seconds"] == pytest.approx(entry["seconds"] + slow["exchange"] / every)
        assert slow["share"] == pytest.approx(slow["exchange"] / every / slow["seconds"])
        assert slow["tokens_per_s"] == pytest.approx(3 * 8 * 64 / slow["seconds"])
        assert slow["data_parallel"]["world_size"] == 6 and slow["data_parallel"]["batch_sequences"] == 24
        assert fast["exchange"] < slow["exchange"] and fast["data_parallel"]["seconds"] > fast["seconds"]


def test_the_table_of_islands(capsys):
    arguments = ("--world-size", "1", "--stages", "1", "--cluster", "2x1", "--network", "1")
    code, text = estimate(capsys, "tiny", *ISLANDS, *arguments)
    table = text.split("3 islands, each such a cluster")[1]
    rows = [line.split() for line in table.splitlines() if line.split()[:1] == ["2x1"]]
    assert code == 0 and len(rows) == 2 * 2  # methods, and the wires that are shown by default
    assert rows[0][1:7] == ["1", "Gbit/s", "0.1", "Gbit/s", "1", "relora"]
    assert all(row[-1].endswith("x") for row in rows)
    assert "islands, each" not in estimate(capsys, "tiny", *arguments)[1]


def test_the_choices_beside_the_recipes_own(capsys):
    changes = overrides(1, "bf16", "relora", 1, "relora.frozen_dtype=nf4", "activation_checkpointing=cheap")
    _, text = estimate(capsys, "tiny", *changes, "--world-size", "2", "--stages", "1", "--json")
    found = json.loads(text)
    frozen, kept = found["frozen_bytes_by_format"], found["activation_bytes_by_checkpointing"]
    weights = sum(shape.numel() for shape in planned(changes).shapes.merged.values())
    for name, bits in (("fp32", 32), ("bf16", 16), ("int8", 8), ("fp8", 8), ("nf4", 4.5), ("nf4 double_quant", 4.13)):
        assert frozen[name] == pytest.approx(weights * bits / 8, rel=0.02), name
    (own,) = (item["size"] for item in found["estimates"][0]["items"] if item["what"] == "frozen weights")
    assert own == frozen["nf4"]
    assert kept["full"] < kept["selective"] < kept["cheap"] < kept["none"]
    assert kept["cheap"] == found["activation_bytes"]["relora"]
    _, text = estimate(capsys, "tiny", *changes, "--world-size", "2", "--stages", "1")
    assert "nf4 <" in text and "cheap <" in text


@pytest.mark.slow
def test_auto_is_planned_as_on_gpus(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    arguments = ("--world-size", "1", "--stages", "0", "--config", "quickstart")
    assert "bf16 (auto, as on GPUs; this machine would run fp32)" in estimate(capsys, *arguments)[1].splitlines()[0]
    assert ", fp32, micro-batch" in estimate(capsys, "precision=fp32", *arguments)[1].splitlines()[0]


def test_sizes_of_which_none_divides_the_batch(capsys):
    code, text = estimate(capsys, "tiny", "--world-size", "8", "3", "--stages", "1")
    assert code == 0 and "over 3, 8 ranks" in text


def test_a_run_directory_that_holds_a_run_is_no_problem(capsys, tmp_path):
    (tmp_path / "status.json").write_text("{}")
    assert estimate(capsys, "tiny", f"run_dir={tmp_path}", "--world-size", "1", "--stages", "0")[0] == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["tiny", "--world-size", "0"], "--world-size"),
        (["tiny", "--ranks-per-host", "0"], "--ranks-per-host: 0"),
        (["tiny", "relora.r=0"], "relora.r"),
        ([], "recipe: none is given"),
        (["tiny", "--cluster", "8"], "'8' is no cluster"),
        (["tiny", "--cluster", "2x1", "--network", "0"], "above 0"),
        (["tiny", "--cluster", "2x1", "--tflops", "-1"], "above 0"),
        (["tiny", "--cluster", "2x1", "--outside", "1"], "--outside: 1 is of the wire between islands"),
        (["tiny", "--cluster", "2x1", "--outside-latency", "9"], "--outside-latency: 9 is of the wire between islands"),
        (["tiny", *ISLANDS, "--outside", "1"], "--outside: 1 is of the wire between clusters; add e.g. --cluster"),
        (["tiny", *ISLANDS, "--outside-latency", "9"], "--outside-latency: 9 is of the wire between clusters"),
        (["tiny", *ISLANDS, "--cluster", "2x1", "--outside", "0"], "above 0"),
    ],
)
def test_bad_input(capsys, arguments, words):
    code, text = estimate(capsys, *arguments)
    assert code in (1, 2) and words in text


def test_a_stage_that_does_not_exist(capsys):
    with pytest.raises(SystemExit):
        main(["estimate", "tiny", "--stages", "4"])
    assert "invalid choice" in capsys.readouterr().err


def test_the_method_of_the_warm_start_has_columns_of_its_own():
    recipe = load_recipe("tiny", ["method=lora", "lora.base=warm_start", "warm_start_method=relora"])
    assert list(compared(recipe)) == ["lora", "relora", "full"]
