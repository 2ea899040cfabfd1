"""The invariants of a restart in every format of the frozen weights, with masters and without."""

import pytest

from tests.ranks import ranks
from tests.zero.restarts import BLOCKS, STAGES, check, restart_by_hand

FORMATS = ["bf16", "int8", "fp8", "nf4"]


@pytest.mark.parametrize("stage", [1, 3])
def test_without_masters_bf16_is_rounded_without_bias(stage):
    check(ranks(2).run(restart_by_hand, stage, "bf16", frozen_master="none"))


@pytest.mark.each_value_once
@pytest.mark.parametrize("frozen_dtype", FORMATS)
@pytest.mark.parametrize("stage", STAGES)
def test_every_format(stage, frozen_dtype):
    check(ranks(2).run(restart_by_hand, stage, "fp32", frozen_dtype=frozen_dtype, **BLOCKS))


@pytest.mark.parametrize("frozen_dtype", ["auto", *FORMATS])
def test_every_format_replicated_under_zero_3(frozen_dtype):
    check(ranks(2).run(restart_by_hand, 3, "fp32", frozen_dtype=frozen_dtype, frozen_placement="replicated", **BLOCKS))


@pytest.mark.each_value_once
@pytest.mark.parametrize("frozen_dtype", ["fp32", "int8", "nf4"])
@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_formats_in_a_bf16_run(placement, frozen_dtype):
    for master in ("cpu", "device"):
        check(
            ranks(2).run(
                restart_by_hand,
                3,
                "bf16",
                frozen_dtype=frozen_dtype,
                frozen_placement=placement,
                frozen_master=master,
                double_quant=frozen_dtype == "nf4",
                **BLOCKS,
            )
        )


@pytest.mark.each_value_once
@pytest.mark.parametrize("frozen_dtype", ["int8", "fp8", "nf4"])
@pytest.mark.parametrize("stage", [1, 3])
def test_formats_without_masters(stage, frozen_dtype):
    check(ranks(2).run(restart_by_hand, stage, "fp32", frozen_dtype=frozen_dtype, frozen_master="none", **BLOCKS))
