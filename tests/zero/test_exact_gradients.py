"""The gradients of a step reach the owners of the weights whole, whichever layers a rank's backward comes to."""

from types import SimpleNamespace

import torch
import torch.distributed as dist

from relora_ds.zero.exact_gradients import ExactGradients
from tests.ranks import ranks

# Two micro-batches of each of two ranks: the layers in the order in which backward comes to them.
BACKWARDS = {
    0: [["last", "twice", "twice", "expert", "first"], ["twice", "last", "first"]],
    1: [["last", "first"], ["expert", "expert", "last", "twice", "first"]],
}


def backward(rank: int, micro: int, place: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of a layer's output `[5, 3]`, and its input `[5, 2]`."""
    generator = torch.Generator().manual_seed(100 * rank + 10 * micro + place)
    return torch.randn(5, 3, generator=generator), torch.randn(5, 2, generator=generator)


def summed_up() -> dict[str, list]:
    """On a rank: the sums of the weights that it owns."""
    names = ["first", "expert", "twice", "last"]
    layers = {name: SimpleNamespace(out_features=3, in_features=2, sketch=None) for name in names}
    owners = {"first": 0, "expert": 1, "twice": 0, "last": 1}
    frozen = SimpleNamespace(layers=layers, owners=owners, device=torch.device("cpu"))
    gradients, rank = ExactGradients(frozen), dist.get_rank()
    for micro, order in enumerate(BACKWARDS[rank]):
        for place, name in enumerate(order):
            layers[name].sketch.add(*backward(rank, micro, place))
        gradients.finish_backward()
    found = {name: gradients.take(name) for name in names}
    return {name: value.tolist() for name, value in found.items() if value is not None}


def test_every_gradient_of_every_rank_is_in_the_sum_of_its_owner():
    expected = {}
    for rank, micros in BACKWARDS.items():
        for micro, order in enumerate(micros):
            for place, name in enumerate(order):
                g, rows = backward(rank, micro, place)
                expected[name] = expected.get(name, 0) + g.t() @ rows
    on_0, on_1 = ranks(2).run(summed_up)
    assert on_0.keys() == {"first", "twice"} and on_1.keys() == {"expert", "last"}
    for name, value in {**on_0, **on_1}.items():
        torch.testing.assert_close(torch.tensor(value), expected[name])
