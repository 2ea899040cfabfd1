"""Section `islands`, and what the rest of a recipe may say where a run is an island."""

import pytest

from relora_ds.config import load_recipe, no_effect
from tests.config.test_mistakes import only_problem, problems_of

pytestmark = pytest.mark.usefixtures("base_recipe")
COUNT, ADDRESS, EVERY = "islands.count=2", "islands.address=host:5555", "islands.sync_every=50"
ISLAND = (COUNT, ADDRESS, EVERY)


def test_defaults_of_the_outer_optimizer():
    def outer(*overrides: str) -> tuple[float, float]:
        return load_recipe("base.yaml", [*ISLAND, *overrides]).islands.outer

    assert outer() == (0.7, 0.5)
    assert outer("islands.outer_optimizer=average") == (1.0, 0.0)
    assert outer("islands.outer_lr=0.5", "islands.outer_momentum=0") == (0.5, 0.0)


def test_nested_names_of_the_keys_are_read(tmp_path):
    nested = ["islands.link.address=host:5555", "islands.link.timeout_s=9", "islands.outer.optimizer=average"]
    read = load_recipe(
        "base.yaml", [COUNT, EVERY, *nested, "islands.outer.lr=0.5", "islands.outer.momentum=0.1"]
    ).islands
    assert (read.address, read.timeout_s, read.outer_optimizer) == ("host:5555", 9, "average")
    assert (read.outer_lr, read.outer_momentum) == (0.5, 0.1)
    written = tmp_path / "nested.yaml"
    written.write_text(
        "extends: base.yaml\nislands:\n  count: 2\n  sync_every: 50\n  outer: {optimizer: average, lr: 0.5}\n"
        "  link: {address: host:5555}\n"
    )
    (tmp_path / "base.yaml").write_text(load_recipe("base.yaml").to_yaml())
    read = load_recipe(written).islands
    assert (read.address, read.outer) == ("host:5555", (0.5, 0.0))


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (("islands.index=2", *ISLAND), "islands.index: 2 is not below islands.count 2; number the islands from 0 to 1"),
        (("islands.index=1",), "islands.index: 1 needs islands.count; set it"),
        (("islands.compress=int4",), "islands.compress: int4 needs islands.count"),
        ((COUNT, EVERY), "islands.address: null says not where the islands meet; use HOST:PORT"),
        (("islands.count=0", ADDRESS, EVERY), "islands.count: 0 is not an integer of at least 1; use e.g. 2"),
        (("islands.timeout_s=1800", *ISLAND), "islands.timeout_s: 1800 is not below guard.watchdog_seconds 1800"),
        (("method=lora", *ISLAND), "islands.count: 2 with method lora: without restarts"),
        (("relora.restart_every=null", *ISLAND), "islands.count: 2 with method relora: without restarts"),
        (("method=full", COUNT, ADDRESS), "islands.sync_every: null, and method full has no restarts"),
        (
            ("method=galore", "relora.residual_every=20", *ISLAND),
            "relora.residual_every: 20 changes W between",
        ),
        (
            ("method=galore", "relora.gradient_estimate=exact", *ISLAND),
            "relora.gradient_estimate: exact is no sum over islands",
        ),
        (
            ("relora.restart_warmup_steps=125", *ISLAND),
            "relora.restart_every: 125 is not above relora.restart_warmup_steps 125",
        ),
    ],
)
def test_mistakes(overrides, start):
    found = problems_of(*overrides)
    assert any(problem.startswith(start) for problem in found), found


def test_a_warm_start_needs_an_interval_too():
    found = only_problem(COUNT, ADDRESS)
    assert found.startswith("islands.sync_every: null, and method full has no restarts to exchange at")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("method=full", "islands.compress_factors=int8"), "compress_factors: int8 has no effect with method full"),
        (("islands.outer_optimizer=average", "islands.outer_momentum=0.9"), "outer_momentum: 0.9 has no effect"),
    ],
)
def test_what_has_no_effect_is_said(overrides, said):
    assert any(said in one for one in no_effect.warnings(load_recipe("base.yaml", [*ISLAND, *overrides])))
    assert not any("islands" in one for one in no_effect.warnings(load_recipe("base.yaml", [*ISLAND])))
