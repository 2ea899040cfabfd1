"""How a run's frozen weights are stored."""

import pytest

from relora_ds import ReLoRAConfig
from relora_ds.lowrank.storage import format_at, has_masters, is_sharded


@pytest.mark.parametrize(
    "stage, placement, in_fp8, name",
    [
        (0, "auto", True, "fp8_both_layouts"),
        (2, "sharded", True, "fp8_both_layouts"),
        (3, "auto", True, "fp8"),
        (3, "sharded", True, "fp8"),
        (3, "replicated", True, "fp8_both_layouts"),
        (1, "auto", False, "fp8"),
    ],
)
def test_what_zero_3_shards_has_one_layout(stage, placement, in_fp8, name):
    """The other one would be gathered at every step too."""
    config = ReLoRAConfig(frozen_dtype="fp8", frozen_placement=placement)
    assert format_at(config, "bf16", stage, in_fp8=in_fp8).name == name
    assert is_sharded(config, stage) is (stage == 3 and placement != "replicated")


@pytest.mark.parametrize(
    "options, precision, expected",
    [
        ({}, "fp32", False),
        ({}, "bf16", True),
        (dict(frozen_dtype="fp32"), "bf16", False),
        (dict(frozen_dtype="nf4"), "fp32", True),
        (dict(frozen_dtype="nf4", frozen_master="none"), "fp32", False),
        (dict(frozen_master="device"), "fp16", True),
    ],
)
def test_what_is_rounded_has_masters(options, precision, expected):
    assert has_masters(ReLoRAConfig(**options), precision) is expected
