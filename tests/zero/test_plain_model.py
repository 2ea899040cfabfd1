"""The plain model that is saved consists of the collected tensors, without a second copy of them."""

import pytest
import torch
from transformers import LlamaForCausalLM

from relora_ds.zero.plain_model import plain_like
from tests.small_models import FAMILIES, llama


def collected(model) -> dict[str, torch.Tensor]:
    return {name: torch.randn_like(parameter) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
def test_tensors_are_taken_over_and_no_random_ones_are_made(family):
    model = FAMILIES[family]()
    state, random_state = collected(model), torch.get_rng_state()
    plain = plain_like(model, dict(state))
    assert {name: p.data_ptr() for name, p in plain.named_parameters()} == {
        name: value.data_ptr() for name, value in state.items()
    }
    assert {tuple(names) for names in tied(plain)} == {tuple(names) for names in tied(model)}
    assert all(buffer.is_meta for buffer in plain.buffers())
    assert torch.equal(torch.get_rng_state(), random_state)


def tied(model) -> list[list[str]]:
    """The names of each parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return list(names.values())


class Computing(LlamaForCausalLM):
    """Reads a value of a parameter while it is built."""

    def __init__(self, config):
        super().__init__(config)
        self.first = self.lm_head.weight[0, 0].item()


def test_a_family_that_computes_with_its_parameters_is_built_with_them():
    model = Computing(llama().config)
    state, random_state = collected(model), torch.get_rng_state()
    plain = plain_like(model, dict(state))
    assert all(torch.equal(plain.get_parameter(name), value) for name, value in state.items())
    assert torch.equal(torch.get_rng_state(), random_state)
