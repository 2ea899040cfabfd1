"""What needs a GPU and no network."""

import torch

from relora_ds.bench import layer as bench
from relora_ds.zero.randomness import seeded_forward
from tests.bench.test_layer import tiny_arguments
from tests.cuda.gpus import gpus


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


def test_dropout_masks_differ_between_ranks_and_the_hosts_draws_do_not():
    gpus(1).run(draw_on_two_ranks)


def test_a_layer_is_timed():
    (result,) = gpus(1).run(bench.run, tiny_arguments("--device", "cuda", "--hidden", "128", "--r", "16"))
    assert all(ms > 0 for entry in result["measured"] for ms in entry["ms"].values())
