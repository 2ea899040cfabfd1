"""`python -m relora_ds bench`."""

import json
import sys
from types import ModuleType

import pytest

from relora_ds.__main__ import main
from relora_ds.lab import bench


@pytest.fixture
def counting(monkeypatch):
    """A benchmark that counts."""
    module = ModuleType("relora_ds.lab.bench.counting")
    module.add_arguments = lambda parser: parser.add_argument("--to", type=int, default=3)
    module.run = lambda arguments: {"numbers": list(range(arguments.to))}
    module.markdown = lambda result: f"| {len(result['numbers'])} |"
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(bench, "BENCHMARKS", {"counting": ("counting", "counts")})


def test_it_prints_the_table_and_writes_the_result_with_its_conditions(counting, tmp_path, capsys):
    assert main(["bench", "counting", "--to", "2", "--out", str(tmp_path / "r.json")]) == 0
    assert capsys.readouterr().out == "| 2 |\n"
    written = json.loads((tmp_path / "r.json").read_text())
    assert (written["bench"], written["result"]) == ("counting", {"numbers": [0, 1]})
    assert written["conditions"]["torch"] and written["conditions"]["commit"]


def test_a_wrong_place_for_the_result_is_found_before_anything_is_measured(counting, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(
        sys.modules["relora_ds.lab.bench.counting"], "run", lambda arguments: pytest.fail("it measured")
    )
    assert main(["bench", "counting", "--out", str(tmp_path / "nowhere" / "r.json")]) == 1
    assert f"error: --out: there is no directory {tmp_path / 'nowhere'}; make it first" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["0", "-3"])
def test_what_cannot_be_counted(counting, capsys, monkeypatch, wrong):
    monkeypatch.setattr(
        sys.modules["relora_ds.lab.bench.counting"], "run", lambda arguments: pytest.fail("it measured")
    )
    assert main(["bench", "counting", "--to", wrong]) == 1
    assert f"error: --to: {wrong} is not possible; give 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("name", bench.BENCHMARKS)
def test_every_benchmark_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["bench", name, "--help"])
    assert ended.value.code == 0 and "--out FILE.json" in capsys.readouterr().out
