"""An update that is requantized again and again is lost; one that a master takes is not."""

import argparse
import importlib.util

import pytest

from relora_ds.lab.bench import requantization as bench


@pytest.fixture(scope="module")
def result():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    return bench.run(parser.parse_args(["--hidden", "128", "--r", "8", "--sizes", "0.03", "0.1"]))


def _series(result, format, size):
    (entry,) = (entry for entry in result["series"] if (entry["format"], entry["size"]) == (format, size))
    return entry


def test_every_format_size_and_restart_is_there(result):
    assert [(entry["size"], entry["format"]) for entry in result["series"]] == [
        (size, format) for size in (0.03, 0.1) for format in bench.FORMATS
    ]
    for entry in result["series"]:
        for way in (entry["others"], entry["ours"]):
            assert {name: len(values) for name, values in way.items()} == {"lost": 20, "distance": 20, "error": 21}


@pytest.mark.parametrize("format", bench.FORMATS)
@pytest.mark.parametrize("size", [0.03, 0.1])
def test_with_a_master_the_error_does_not_grow_and_the_update_arrives(result, format, size):
    ours = _series(result, format, size)["ours"]
    assert max(ours["error"]) <= 1.05 * ours["error"][0]
    assert abs(ours["lost"][-1]) <= 0.1  # of 16,384 weights
    assert ours["distance"][-1] < ours["distance"][0]  # the same rounding beside a growing sum


@pytest.mark.parametrize("format", bench.FORMATS)
def test_without_one_the_error_grows(result, format):
    entry = _series(result, format, 0.1)
    assert entry["others"]["error"][-1] > 1.5 * entry["ours"]["error"][-1]
    assert entry["others"]["error"][0] == entry["ours"]["error"][0]  # the same at first


def test_nf4_and_int8_lose_updates_that_are_small_beside_their_codes(result):
    for format in ("nf4", "nf4_double"):
        assert _series(result, format, 0.1)["others"]["lost"][-1] > 0.9
    assert _series(result, "int8", 0.03)["others"]["lost"][-1] > 0.2
    assert abs(_series(result, "int8", 0.1)["others"]["lost"][-1]) < 0.05


def test_the_updates_have_the_size_that_is_asked_for():
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    arguments = parser.parse_args(["--hidden", "128", "--r", "8", "--restarts", "5"])
    weight, factors = bench._weight_and_factors(arguments, 0.1)
    updates = [lora_B @ lora_A for lora_A, lora_B in factors]
    assert all(update.norm() / weight.norm() == pytest.approx(0.1 / 5**0.5) for update in updates)
    assert sum(updates).norm() / weight.norm() == pytest.approx(0.1, rel=0.05)


def test_the_table(result):
    lines = bench.markdown(result).splitlines()
    assert lines[0] == "After 20 restarts; W 128x128, updates of rank 8:"
    assert len(lines) == 2 + 2 + 10 and lines[4].startswith("| bf16 | 0.03 |")


def test_what_is_missing_or_odd_is_said(monkeypatch):
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    with pytest.raises(ValueError, match="--hidden: 100 is no multiple of 16"):
        bench.run(parser.parse_args(["--hidden", "100"]))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r'nf4 needs bitsandbytes; pip install "\.\[quantization\]"'):
        bench.run(parser.parse_args([]))
