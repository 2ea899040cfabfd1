"""The account of what islands keep and exchange: by hand, and against the live tensors of an engine that is one."""

import pytest
import torch

from relora_ds.config import IslandsConfig, ReLoRAConfig
from relora_ds.planning import device_memory
from relora_ds.planning.device_memory import DEVICE, HOST, KEPT, RESTART
from relora_ds.planning.host import CHECKPOINT
from relora_ds.planning.network import Shapes
from relora_ds.planning.planned_exchange import exchange_bytes, exchange_items
from relora_ds.zero.teardown import release
from tests.islands.servers import serving
from tests.planning.engines import build, micro_step, overrides, planned
from tests.ranks import ranks
from tests.zero.live_tensors import live_bytes

EVERY = 2
CYCLES = (f"relora.restart_every={EVERY}", "relora.restart_warmup_steps=1", "optim.warmup_steps=1")
SLOW = pytest.mark.slow
# Two layers of rank 2, and three tensors more that train. Of two ranks the first one owns `a` and 100 elements.
SHAPES = Shapes(
    groups=((8, 16, 8, 8), (100, 60), (10,)),
    merged={"a": torch.Size((8, 4)), "b": torch.Size((4, 4))},
    frozen=(),
    factors=((8, 16), (8, 8)),
)
ANCHORS, MOMENTA, ERRORS = "anchors of the exchanges", "momenta of the outer optimizer", "errors of the compression"
COPIES, UPDATES = "copies of anchors, momenta and errors", "updates of all islands"


def items(**islands) -> dict[tuple[str, str], int]:
    """Bytes by what they are and when, all of them on the host."""
    config = IslandsConfig(count=3, address="host:5555", **islands)
    found = exchange_items(SHAPES, ReLoRAConfig(r=2, lora_alpha=2), config, world_size=2)
    assert {item.where for item in found} == {HOST}
    return {(item.what, item.when): item.size for item in found}


def test_by_hand():
    anchors, momenta, update = 4 * 100, 4 * (100 + 32), (2 * 2 + 50) + 4 * (8 + 16)
    assert items(compress="int4") == {
        (ANCHORS, KEPT): anchors,
        (MOMENTA, KEPT): momenta,
        (ERRORS, KEPT): anchors,
        (COPIES, RESTART): 2 * anchors + momenta,
        (COPIES, CHECKPOINT): 2 * anchors + momenta,
        (UPDATES, RESTART): 3 * update,
    }
    other_rank = (2 + 30) + (2 + 5) + 4 * (8 + 8)
    relora = ReLoRAConfig(r=2, lora_alpha=2)
    assert exchange_bytes(SHAPES, relora, IslandsConfig(compress="int4")) == update + other_rank
    in_8_bits = IslandsConfig(compress="int4", compress_factors="int8")
    assert exchange_bytes(SHAPES, relora, in_8_bits) == 54 + (32 + 7) + (8 + 16 + 8 + 8) + 4 * 2


def test_what_is_not_needed_is_not_kept():
    anchors = 4 * 100
    assert items(outer_optimizer="average") == {
        (ANCHORS, KEPT): anchors,
        (COPIES, RESTART): anchors,
        (COPIES, CHECKPOINT): anchors,
        (UPDATES, RESTART): 3 * (anchors + 4 * (8 + 16)),
    }
    assert (MOMENTA, KEPT) not in items(outer_momentum=0.0)


def live_after_exchanges(changes: list[str]) -> int:
    """On a rank: bytes of the live tensors of an island that has exchanged twice."""
    engine = build(changes)
    for step in range(2 * EVERY):
        micro_step(engine, step)
        engine.step()
    assert engine.exchange.round == 2
    found = live_bytes()
    engine.exchange._islands.close()
    release(engine)
    return found


@pytest.mark.parametrize(
    ("stage", "precision", "method", "islands"),
    [
        (1, "bf16", "relora", {"compress": "int4"}),
        pytest.param(3, "fp32", "relora", {"outer_optimizer": "average"}, marks=SLOW),
        pytest.param(0, "fp32", "relora", {}, marks=SLOW),
        pytest.param(2, "bf16", "full", {"compress": "int8"}, marks=SLOW),
        pytest.param(3, "bf16", "full", {}, marks=SLOW),
    ],
)
def test_what_is_kept_is_alive(stage, precision, method, islands, tmp_path):
    cycles = CYCLES if method == "relora" else ()
    settings = {"count": 1, "sync_every": EVERY, **islands}
    with serving(tmp_path) as server:
        settings["address"] = server.address.removeprefix("tcp://")
        more = (f"islands.{name}={value}" for name, value in settings.items())
        changes = overrides(stage, precision, method, 1, *cycles, *more)
        found = ranks(2).run(live_after_exchanges, changes)
    account = planned(changes).items
    kept = device_memory.total(account, DEVICE, KEPT) + device_memory.total(account, HOST, KEPT)
    assert found == [pytest.approx(kept, rel=0.05)] * 2
