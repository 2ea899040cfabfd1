"""The recomputation of CR-Net: what a layer finds in backward is what was stored, and how little is kept for it."""

import copy
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from relora_ds.architectures.relora_crnet import CRNetLinear, scale
from relora_ds.config import RecipeError, load_recipe
from relora_ds.models import inversion, recompute
from relora_ds.planning.activations import _LiveBytes
from relora_ds.training.preflight import resolve
from tests.models.test_crnet import VECTORS, equal, tensor
from tests.models.test_recompute import step
from tests.small_models import batch, cola, crnet

DEEP = {"num_hidden_layers": 19, "num_key_value_heads": 1, "attention_bias": True}


def deep(seed: int = 0, **changes):
    """Nineteen layers, whose β are of both signs, and a few almost 0."""
    model = crnet(**{**DEEP, **changes}).train()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, CRNetLinear):
                value = 0.4 + torch.rand(1, generator=generator)
                if torch.rand(1, generator=generator) < 0.1:
                    value *= 1e-4
                module.beta.copy_(value if torch.rand(1, generator=generator) < 0.7 else -value)
    return model


def stored_and_found(model, mode: str = "inverted"):
    return step(copy.deepcopy(model)), step(recompute.apply(copy.deepcopy(model), mode))


def test_a_projection_of_the_vectors_is_inverted():
    for layer in (2, 1):
        change = tensor("X")[layer] @ tensor("A")[layer - 1] @ tensor("B")[layer - 1]
        found = inversion.invert(tensor(f"Y{layer + 1}"), change, scale(tensor("beta")[layer - 1]))
        equal(found, f"Y{layer}")


@pytest.mark.parametrize("case", VECTORS["relative_error_of_one_inversion"])
def test_what_one_division_costs_in_each_precision(case):
    """The reason for fp32, for short chains, and for a bound on what they make of an error."""
    known = VECTORS["relative_error_of_one_inversion"][case]
    dtype, beta = re.fullmatch(r"(\w+) beta=([\d.]+)", case).groups()
    dtype, factor = getattr(torch, dtype), torch.tensor(float(beta))
    before, change = torch.randn(2, 64, 64, generator=torch.Generator().manual_seed(0))
    before, change, factor = (each.to(dtype) for each in (before, change, factor))
    found = inversion.invert(factor * before + change, change, factor)
    error = ((found - before).double().norm() / before.double().norm()).item()
    assert known / 2 < error < known * 2


def norm(gradients) -> float:
    return torch.cat([gradient.flatten().double() for gradient in gradients]).norm().item()


def apart(gradients: dict, others: dict) -> float:
    """How far two gradients are apart, as a part of the whole one: some of it is next to 0, such as keys' biases."""
    assert gradients.keys() == others.keys()
    differences = [norm([gradient.double() - others[name]]) for name, gradient in gradients.items()]
    return max(differences) / norm(gradients.values())


def test_losses_and_gradients_are_those_of_stored_outputs():
    (loss, gradients), (found, gradients_found) = stored_and_found(crnet(**DEEP).train())
    assert torch.equal(loss, found) and sum(name.endswith("beta") for name in gradients) == 7 * 18
    assert apart(gradients, gradients_found) < 1e-6
    for kind in ("beta", "A", "B", "layernorm.weight", "layers.0.mlp.up_proj.weight", "embed_tokens.weight"):
        some, others = (
            {name: one for name, one in each.items() if name.endswith(kind)} for each in (gradients, gradients_found)
        )
        assert some and apart(some, others) < 1e-5, kind


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_any_beta_the_difference_is_below_what_rounding_makes_anyway(dtype):
    """In bf16, too: the Y are in fp32, and so is their inversion."""
    model = deep().to(dtype)
    (loss, gradients), (found, gradients_found) = stored_and_found(model)
    _, exact = step(copy.deepcopy(model).double())
    assert torch.equal(loss, found)
    assert apart(gradients, gradients_found) < apart(exact, gradients)


def test_in_fp64_the_difference_is_rounding():
    (_, gradients), (_, found) = stored_and_found(deep().double())
    assert apart(gradients, found) < 1e-14


def test_two_forwards_before_their_backwards():
    model = crnet(**DEEP).train()
    stored, found = copy.deepcopy(model), recompute.apply(copy.deepcopy(model), "inverted")
    for each in (stored, found):
        first, second = (each(input_ids=batch(k, 3), labels=batch(k, 3)).loss for k in range(2))
        second.backward()
        first.backward()
    assert apart(*({name: p.grad for name, p in each.named_parameters()} for each in (stored, found))) < 1e-6


def kept(model) -> list[list[bool]]:
    """For every layer but the first, which of its seven Y_{l-1} are kept until backward."""
    found, add = [], inversion._Chain.add
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inversion._Chain, "add", lambda *how: found.append(add(*how)) or found[-1])
        loss = recompute.apply(model, "inverted")(input_ids=batch(0, 2), labels=batch(0, 2)).loss
    of_forward = [[link._held is not None for link in links] for links in found]
    loss.backward()
    assert [[link._held is not None for link in links] for links in found[1:]] == of_forward[1:], "the rest is let go"
    return of_forward


def test_every_eighth_and_the_last_are_kept():
    layers = [layer for layer, links in enumerate(kept(crnet(**DEEP).train()), 1) if all(links)]
    assert layers == [8, 16, 18]
    assert kept(crnet(num_hidden_layers=2).train()) == [[True] * 7], "the last; there is no other"


def test_where_errors_would_grow_more_is_kept():
    """Halves from layer to layer grow to 16 in four layers; a β of almost 0 would lose all digits at once."""
    model = crnet(**{**DEEP, "num_hidden_layers": 12}).train()
    for layer in model.model.layers[1:]:
        layer.mlp.up_proj.beta.data.fill_(-0.5)
    model.model.layers[3].self_attn.o_proj.beta.data.fill_(0.0)
    found = kept(model)
    assert [layer for layer, links in enumerate(found, 1) if links[5]] == [5, 8, 11]
    assert [layer for layer, links in enumerate(found, 1) if links[3]] == [3, 8, 11]
    assert [layer for layer, links in enumerate(found, 1) if links[0]] == [8, 11]


def kept_by_layers(num_layers: int, mode: str) -> float:
    """Elements of a network that are kept from forward to backward, for each token."""
    with FakeTensorMode():
        model = crnet(hidden_size=64, intermediate_size=176, num_hidden_layers=num_layers, crnet_r=8).train()
        model.set_attn_implementation("sdpa")
        recompute.apply(model, mode)
        tokens = torch.zeros(4, 32, dtype=torch.long)
        with _LiveBytes() as live:
            loss = model(input_ids=tokens, labels=tokens).loss
            found = live.now
        assert loss.requires_grad
    return found / (4 * tokens.numel())


def test_what_a_layer_keeps():
    """Its input and seven products of width r; every eighth, and the last, also seven Y."""
    own, ys = 64 + 7 * 8, (4 + 1) * 64 + 2 * 176
    assert kept_by_layers(6, "inverted") - kept_by_layers(5, "inverted") == own
    assert kept_by_layers(10, "inverted") - kept_by_layers(8, "inverted") == 2 * own + ys
    assert kept_by_layers(6, "low_rank") - kept_by_layers(5, "low_rank") == own + ys


def test_another_network_is_refused_by_name(tmp_path):
    with pytest.raises(
        ValueError, match="activation_checkpointing: inverted .* a relora_cola model trains; use low_rank"
    ):
        recompute.apply(cola(), "inverted")
    settings = ["warm_start_steps=0", "activation_checkpointing=inverted", f"run_dir={tmp_path / 'run'}"]
    with pytest.raises(RecipeError, match="activation_checkpointing: inverted .* a llama model trains"):
        resolve("tiny", ["method=full", *settings])
    assert not (tmp_path / "run").exists()
    assert resolve("tiny", ["method=crnet", "crnet.r=8", *settings])
    crnet(max_position_embeddings=64).config.save_pretrained(tmp_path / "shape")
    exported = ["method=full", "model.preset=null", f"model.name_or_path={tmp_path / 'shape'}"]
    assert resolve("tiny", [*exported, *settings])


def test_compilation_is_refused_by_name():
    changes = ["method=crnet", "warm_start_steps=0", "crnet.r=8", "activation_checkpointing=inverted", "compile=true"]
    with pytest.raises(RecipeError, match="activation_checkpointing: inverted reads every layer's β"):
        load_recipe("tiny", changes)
