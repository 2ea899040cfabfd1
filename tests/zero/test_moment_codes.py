"""8-bit moments are read in fp32 and written back without a change, from what bitsandbytes' own step has left."""

import pytest
import torch

from relora_ds.zero.adam_state import QuantizedMoment, zero_code
from relora_ds.zero.moment_codes import BLOCK, decode, encode

pytest.importorskip("bitsandbytes", reason="the extra .[quantization]")

N = 30 * BLOCK + 77  # the last block is short


@pytest.fixture(scope="module")
def state():
    from bitsandbytes.optim import AdamW8bit

    generator = torch.Generator().manual_seed(0)
    parameter = torch.nn.Parameter(torch.randn(N, generator=generator))
    optimizer = AdamW8bit([parameter])
    for _ in range(5):
        spread = torch.randn(N, generator=generator).mul(2).exp()
        parameter.grad = torch.randn(N, generator=generator) * spread
        parameter.grad[3 * BLOCK : 4 * BLOCK] = 0  # a block without any
        optimizer.step()
    return optimizer.state[parameter]


@pytest.mark.parametrize("number", [1, 2])
def test_values_are_those_of_bitsandbytes(state, number):
    codes, scales, levels = (state[f"{what}{number}"] for what in ("state", "absmax", "qmap"))
    theirs = torch.ops.bitsandbytes.dequantize_blockwise(codes, scales, levels, BLOCK, torch.float32)
    assert torch.equal(decode(codes, scales, levels), theirs)


@pytest.mark.parametrize("kept", [1.0, 0.5, 0.1, 0.01])
@pytest.mark.parametrize("number", [1, 2])
def test_what_was_read_is_written_exactly_also_when_pruned(state, number, kept):
    codes, scales, levels = (state[f"{what}{number}"] for what in ("state", "absmax", "qmap"))
    mask = torch.rand(N, generator=torch.Generator().manual_seed(1)) < kept
    pruned = codes.clone()
    QuantizedMoment(pruned, scales, levels, 0, N).keep(mask)
    values = decode(pruned, scales, levels)
    assert torch.equal(values, decode(codes, scales, levels) * mask)
    assert torch.equal(decode(*encode(values, levels), levels), values)


@pytest.mark.parametrize("number", [1, 2])
def test_neighbours_in_a_block_are_written_one_after_the_other(state, number):
    """As a resume does it: three tensors end within blocks, and each is written alone into moments that are 0."""
    codes, scales, levels = (state[f"{what}{number}"] for what in ("state", "absmax", "qmap"))
    values = decode(codes, scales, levels)
    new, new_scales = torch.full_like(codes, zero_code(levels)), torch.zeros_like(scales)
    edges = [0, 5 * BLOCK + 10, 5 * BLOCK + 100, 9 * BLOCK + 1, N]
    for start, stop in zip(edges, edges[1:], strict=False):
        QuantizedMoment(new, new_scales, levels, start, stop).write(values[start:stop])
    assert torch.equal(decode(new, new_scales, levels), values)
    for start, stop in zip(edges, edges[1:], strict=False):
        assert torch.equal(QuantizedMoment(new, new_scales, levels, start, stop).read(), values[start:stop])


@pytest.mark.parametrize("number", [1, 2])
def test_other_values_are_rounded_to_the_nearest_level(state, number):
    levels = state[f"qmap{number}"]
    values = torch.randn(4 * BLOCK, generator=torch.Generator().manual_seed(2))
    values = values.square() if number == 2 else values
    codes, scales = encode(values, levels)
    assert torch.equal(scales, values.view(4, BLOCK).abs().amax(1))
    distance = (values.view(4, BLOCK, 1) - levels * scales[:, None, None]).abs()
    chosen = distance.gather(2, codes.view(4, BLOCK, 1).long())
    assert (chosen <= distance.amin(2, keepdim=True) * (1 + 1e-5) + 1e-9).all()
