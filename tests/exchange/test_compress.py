import pytest
import torch

from relora_ds.exchange.compress import BLOCK, COMPRESSIONS, num_bytes, pack, unpack

SHAPES = [(1,), (3, 5), (BLOCK,), (2, BLOCK), (7, 33), (4, 3, 5)]


@pytest.mark.parametrize("how", COMPRESSIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_bytes_and_values(how, shape):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed = pack(value, how)
    assert packed.dtype == torch.uint8 and packed.numel() == num_bytes(value.numel(), how)
    found = unpack(packed, value.shape, how)
    assert found.shape == value.shape and found.dtype == torch.float32
    if how == "int2":  # of normal values 0.119 (Max, 1960), and bf16's rounding of the scale
        assert (found - value).square().sum() <= (0.2 if value.numel() > 1 else 1e-4) * value.square().sum()
        return
    # Half a step of a block's largest element, and bf16's rounding of the scale.
    step = {"none": 0.0, "bf16": 2**-8, "int8": 0.5 / 127 + 2**-8, "int4": 0.5 / 7 + 2**-8}[how]
    assert (found - value).abs().max() <= step * value.abs().max()


@pytest.mark.parametrize("how", COMPRESSIONS)
def test_zeros_stay_zeros(how):
    assert not unpack(pack(torch.zeros(70), how), torch.Size([70]), how).any()


@pytest.mark.parametrize("how", ["bf16", "int8", "int4", "int2"])
def test_what_is_lost_arrives_with_error_feedback(how):
    """The sum of what arrives differs from the sum of what was meant by one rounding, and not by one each time."""
    generator = torch.Generator().manual_seed(0)
    meant, arrived, error = torch.zeros(100), torch.zeros(100), torch.zeros(100)
    for _ in range(50):
        update = torch.randn(100, generator=generator)
        meant += update
        sent = update + error
        received = unpack(pack(sent, how), sent.shape, how)
        error = sent - received
        arrived += received
    assert torch.allclose(meant - arrived, error, atol=1e-4)
    assert error.abs().max() < (2 if how == "int2" else 0.5)


def test_two_bits_leave_as_much_out_as_theory_says():
    value = torch.randn(1000, BLOCK, generator=torch.Generator().manual_seed(0))
    left_out = (unpack(pack(value, "int2"), value.shape, "int2") - value).square().mean()
    assert left_out == pytest.approx(0.1188, abs=0.006)  # a scale for each block: a little less


@pytest.mark.parametrize("numel", [1, 5, BLOCK, BLOCK + 1])
def test_two_bits_never_make_an_update_larger(numel):
    """Which error feedback needs, also for one large element among zeros, and in a block that is not full."""
    value = torch.zeros(numel)
    value[-1] = 5.0
    found = unpack(pack(value, "int2"), value.shape, "int2")
    assert 0 < found.norm() <= 1.01 * value.norm() and (found - value).norm() < value.norm()


def test_blocks_do_not_share_scales():
    value = torch.cat([torch.full((BLOCK,), 1000.0), torch.full((BLOCK,), 0.001)])
    assert torch.allclose(unpack(pack(value, "int4"), value.shape, "int4"), value, rtol=2**-8)
