"""A layer in every format, precision and way to compute, on an emulated GPU that is not the first."""

import pytest

from tests.emulated_cuda import layers
from tests.emulated_cuda.pool import emulated_ranks

FORMATS = ("dense", "fp32", "bf16", "fp16", "int8", "fp8", "fp8_both_layouts", "nf4", "nf4_double")


REPEATED = ("fp16", "fp8_both_layouts", "nf4")  # near to what the others do


@pytest.mark.parametrize(
    "format", [pytest.param(name, marks=[pytest.mark.slow] * (name in REPEATED)) for name in FORMATS]
)
def test_a_layer_computes_and_merges_on_its_gpu(format):
    for ways in emulated_ranks().run(layers.every_way, format):
        assert len(ways) == 24
