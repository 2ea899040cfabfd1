import pytest
import torch

from relora_ds.exchange.outer import Outer
from tests.peak_bytes import PeakBytes


@pytest.mark.parametrize(("lr", "momentum"), [(0.7, 0.9), (1.0, 0.0), (0.5, 0.0), (1.0, 0.5)])
def test_it_is_sgd_of_pytorch_on_the_mean_of_the_updates(lr, momentum):
    generator = torch.Generator().manual_seed(0)
    ours = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    theirs = torch.nn.Parameter(ours.clone())
    optimizer = torch.optim.SGD([theirs], lr=lr, momentum=momentum, nesterov=momentum > 0)
    outer = Outer(lr, momentum)
    for _ in range(4):
        update = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        theirs.grad = -update
        optimizer.step()
        ours = ours + outer.step_("w", update.clone())
    assert torch.allclose(ours, theirs.data, rtol=1e-6, atol=1e-6)


def test_the_plain_mean_changes_no_bit():
    update = torch.randn(4)
    assert torch.equal(Outer(1.0, 0.0).step_("w", update.clone()), update)


def test_momenta_go_on_where_they_were():
    whole, first, second = Outer(0.7, 0.9), Outer(0.7, 0.9), Outer(0.7, 0.9)
    updates = torch.randn(4, 3)
    expected = [whole.step_("w", update.clone()) for update in updates]
    found = [first.step_("w", update.clone()) for update in updates[:2]]
    second.restore(["w", "another"], first.held().get)
    found += [second.step_("w", update.clone()) for update in updates[2:]]
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_a_step_takes_one_copy_of_the_weight_besides_what_it_keeps():
    outer, updates = Outer(0.7, 0.9), torch.randn(3, 1000)
    outer.step_("w", updates[0])
    for update in updates[1:]:
        with PeakBytes() as memory:
            outer.step_("w", update)
        assert memory.peak == update.nbytes and memory.live == 0
