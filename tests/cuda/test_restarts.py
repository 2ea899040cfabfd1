"""All that must be true of a restart, on GPUs."""

import pytest

from tests.cuda.gpus import WORLD_SIZES, needs, on_gpus
from tests.zero.restarts import BLOCKS, restart_by_hand

FORMATS = ["int8", "fp8", pytest.param("nf4", marks=needs("bitsandbytes"))]


def check(world_size: int, *args, **kwargs) -> None:
    results = on_gpus(world_size, restart_by_hand, *args, **kwargs)
    assert all(result == results[0] for result in results), "the ranks disagree"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 3, 0, 2])
def test_invariants(stage, precision, world_size):
    check(world_size, stage, precision)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("frozen_dtype", FORMATS)
@pytest.mark.parametrize("stage, placement", [(1, "auto"), (3, "auto"), (3, "replicated")])
def test_formats(stage, placement, frozen_dtype, precision):
    check(1, stage, precision, frozen_dtype=frozen_dtype, frozen_placement=placement, **BLOCKS)


@pytest.mark.parametrize("master", ["device", "none"])
@pytest.mark.parametrize("stage", [1, 3])
def test_masters_elsewhere(stage, master):
    check(1, stage, "bf16", frozen_master=master)


@pytest.mark.parametrize("stage", [1, 3])
def test_the_optimizer_on_the_host(stage):
    check(1, stage, "bf16", offload=True)


def test_parameters_on_the_host():
    check(1, 3, "bf16", zero={"offload_param": {"device": "cpu"}})
