"""A merge is exact, also where the process computes fp32 products in TF32; and ranks draw masks of their own."""

import pytest
import torch

from relora_ds.lowrank.frozen import add_update_
from relora_ds.zero.randomness import seeded_forward
from tests.cuda.gpus import on_gpus, real_gpu


def errors_under_tf32() -> tuple[float, float]:
    """Relative, of a plain product and of a merge's."""
    device, generator = torch.device("cuda", torch.cuda.current_device()), torch.Generator().manual_seed(0)
    lora_A, lora_B = (torch.randn(*size, generator=generator).to(device) for size in ((64, 512), (512, 64)))
    exact = lora_B.double() @ lora_A.double()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        plain, merged = lora_B @ lora_A, add_update_(torch.zeros(512, 512, device=device), lora_A, lora_B, 1.0)
    finally:
        torch.set_float32_matmul_precision(before)
    return tuple(((found.double() - exact).norm() / exact.norm()).item() for found in (plain, merged))


def test_tf32_does_not_reach_a_merge():
    ((_, merged),) = on_gpus(1, errors_under_tf32)
    assert merged < 1e-6


@real_gpu
def test_tf32_is_switched_on_there():
    """Else the test above says nothing."""
    ((plain, _),) = on_gpus(1, errors_under_tf32)
    if plain < 1e-6:
        pytest.skip("this GPU has no TF32")
    assert plain > 1e-5


def draw_on_two_ranks() -> None:
    device, found = torch.device("cuda", torch.cuda.current_device()), {}
    torch.manual_seed(5)
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    for rank in (0, 1, 0):
        with seeded_forward("0/0/0", rank, device, differs_on_cpu=True):
            drawn = torch.rand(4).tolist(), torch.rand(4, device=device).tolist()
        assert found.setdefault(rank, drawn) == drawn
        assert torch.equal(torch.get_rng_state(), before[0]) and torch.equal(torch.cuda.get_rng_state(), before[1])
    assert found[0][0] == found[1][0] and found[0][1] != found[1][1]


@real_gpu
def test_dropout_masks_differ_between_ranks_and_the_hosts_draws_do_not():
    on_gpus(1, draw_on_two_ranks)
