"""An engine's forward: no mask and no wait where no documents are to be kept apart, else the same results."""

import contextlib
import functools
import inspect
import threading
from unittest import mock

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaForCausalLM, MistralConfig, masking_utils
from transformers import modeling_flash_attention_utils as flash_attention_utils

import relora_ds
from relora_ds.models import compilation
from relora_ds.zero import attention_mask
from tests.parity import cases
from tests.ranks import ranks
from tests.small_models import LENGTH, VOCAB, batch, llama

IDS = batch(0, 2)
# Two documents in every row.
PACKED = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)]).expand(2, -1)
PADDED = torch.ones_like(IDS).index_fill_(1, torch.tensor([LENGTH - 2, LENGTH - 1]), 0)


def network(kind: type = LlamaForCausalLM, **changes):
    model = kind(llama(num_hidden_layers=2, **changes).config)
    model.load_state_dict(llama(num_hidden_layers=2, **changes).state_dict())
    model.set_attn_implementation("sdpa")
    return model


def sliding():
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=20,
        intermediate_size=35,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        sliding_window=4,
        use_cache=False,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)


def engine_of(model):
    engine, *_ = relora_ds.initialize(
        model, cases.ds_settings(0, "fp32"), lr=1e-2, total_steps=10, precision="fp32", micro_batch_size=2
    )
    return engine


class Attention(TorchFunctionMode):
    """The mask and `is_causal` of every call of PyTorch's attention."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.seen.append((kwargs["attn_mask"], kwargs["is_causal"]))
        return func(*args, **(kwargs or {}))


class Answers(TorchDispatchMode):
    """How often the host asked a tensor for a value: on a GPU it waits for each."""

    number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func.name() == "aten::_local_scalar_dense"
        return func(*args, **(kwargs or {}))


def untouched():
    """A context in which transformers searches as it is written."""
    search = inspect.unwrap(masking_utils.find_packed_sequence_indices)
    return mock.patch.object(masking_utils, "find_packed_sequence_indices", search)


def forwards() -> dict:
    """What a forward of the engine, and one of the model itself, show of their attention."""
    found, plain, engine = {}, network(), engine_of(network())
    for mode in (True, False):
        for name, model in (("plain", plain), ("engine", engine)):
            model.train(mode)
            with contextlib.ExitStack() as stack:
                if name == "plain":
                    stack.enter_context(untouched())
                attention, answers = stack.enter_context(Attention()), stack.enter_context(Answers())
                loss = model(input_ids=IDS, labels=IDS).loss
            found[name, mode] = attention.seen, answers.number, loss.item()
            if mode:
                loss.backward() if model is plain else engine.backward(loss)
        found["gradients"] = [[p.grad for p in each.parameters()] for each in (plain, engine.module)]
    cases.release(engine)
    return found


def test_no_mask_and_nothing_asked_of_the_device():
    (found,) = ranks(1).run(forwards)
    for mode in (True, False):
        assert found["engine", mode][:2] == ([(None, True)] * 2, 0)
        assert found["plain", mode][1] > 0  # else there is nothing left to do without
        assert found["engine", mode][2] == found["plain", mode][2]
    assert all(torch.equal(one, other) for one, other in zip(*found["gradients"], strict=True))


def compiled_forwards() -> dict:
    """Masks in the graph, and losses, of a compiled engine: without positions, with packed ones, and without again."""
    seen, engine = [], engine_of(network())

    def backend(graph, inputs):
        seen.extend(
            (node.kwargs["attn_mask"] is None, node.kwargs["is_causal"])
            for node in graph.graph.nodes
            if node.target is F.scaled_dot_product_attention
        )
        return graph

    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
        compilation.apply(engine.module)
    found = {"losses": [], "masks": seen}
    for options in ({}, {}, {"position_ids": PACKED}, {}, {"position_ids": PACKED}):
        found["losses"].append(engine(input_ids=IDS, labels=IDS, **options).loss.item())
        found.setdefault("first masks", list(seen))
    cases.release(engine)
    return found


def test_a_compiled_model_has_no_mask_either():
    (found,) = ranks(1).run(compiled_forwards)
    whole, packed = (
        network()(input_ids=IDS, labels=IDS, position_ids=positions).loss.item() for positions in (None, PACKED)
    )
    assert found["first masks"] == [(True, True)] * 2
    assert found["losses"] == pytest.approx([whole, whole, packed, whole, packed], rel=1e-6)
    assert len(found["masks"]) == 4  # with positions it is compiled for itself, once


class ByDocument(LlamaForCausalLM):
    """Somebody's model, which begins to count again after every token 0."""

    def forward(self, input_ids, labels=None):
        is_end = (input_ids == 0).long()
        document = is_end.cumsum(1) - is_end
        positions = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        first = torch.stack([torch.where(document == number, positions, LENGTH).amin(1) for number in range(LENGTH)], 1)
        return super().forward(input_ids=input_ids, labels=labels, position_ids=positions - first.gather(1, document))


WAYS = {
    "packed, by name": (network, (), {"input_ids": IDS, "position_ids": PACKED}),
    "packed, unnamed": (network, (IDS, None, PACKED), {}),
    "padded": (network, (), {"input_ids": IDS, "attention_mask": PADDED}),
    "one unnamed input": (network, (IDS,), {}),
    "embeddings": (network, (), {"inputs_embeds": torch.linspace(-1, 1, 2 * LENGTH * 20).view(2, LENGTH, 20)}),
    "a sliding window": (sliding, (), {"input_ids": IDS}),
    "positions of its own": (functools.partial(network, ByDocument), (), {"input_ids": IDS}),
    "eager attention": (llama, (), {"input_ids": IDS}),
}


def logits(way: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the model itself, and of its engine."""
    make, inputs, options = WAYS[way]
    with untouched():
        plain = make()(*inputs, **options).logits.detach()
    engine = engine_of(make())
    found = engine(*inputs, **options).logits.detach()
    cases.release(engine)
    return plain, found


@pytest.mark.parametrize("way", WAYS)
def test_results_are_the_models_own(way):
    ((plain, found),) = ranks(1).run(logits, way)
    assert torch.equal(plain, found)


def beside_another_thread() -> tuple[float, float]:
    """The loss of packed rows, and the same computed in another thread while an engine's forward runs."""
    engine, other, losses = engine_of(network()), network(), []

    def packed_rows() -> None:
        losses.append(other(input_ids=IDS, labels=IDS, position_ids=PACKED).loss.item())

    def in_a_thread(*_) -> None:
        thread = threading.Thread(target=packed_rows)
        thread.start()
        thread.join()

    with untouched():
        packed_rows()
    handle = engine.module.register_forward_pre_hook(in_a_thread)
    engine(input_ids=IDS)
    handle.remove()
    cases.release(engine)
    return tuple(losses)


def test_other_threads_keep_documents_apart_meanwhile():
    ((alone, beside),) = ranks(1).run(beside_another_thread)
    assert alone == beside != network()(input_ids=IDS, labels=IDS).loss.item()


class Engine:
    """What `skip_search` wants of an engine."""

    def __init__(self, module):
        self.module = module

    @attention_mask.skip_search
    def forward(self, **inputs):
        return self.module(**inputs).loss.item()


def test_flash_attention_is_not_asked_in_every_layer():
    """Its own search looks at the positions' values where a batch is one row."""
    engine, answers = Engine(network()), []

    def ask(*_) -> None:
        answers.append(bool(flash_attention_utils._is_packed_sequence(PACKED[:1], 1)))

    for layer in engine.module.model.layers:
        layer.register_forward_pre_hook(ask)
    engine.forward(input_ids=IDS, labels=IDS)
    engine.forward(input_ids=IDS, labels=IDS, position_ids=PACKED)
    assert answers == [False, False, True, True]


def test_after_an_exception_it_searches_again():
    engine, packed = Engine(network()), {"input_ids": IDS, "labels": IDS, "position_ids": PACKED}
    with untouched():
        expected = engine.module(**packed).loss.item()
    with pytest.raises(IndexError):
        engine.forward(input_ids=IDS + VOCAB)
    assert engine.module(**packed).loss.item() == expected


def test_a_transformers_without_such_a_search_is_left_alone(monkeypatch):
    expected = network()(input_ids=IDS, labels=IDS).loss.item()
    attention_mask._install.cache_clear()
    monkeypatch.delattr(flash_attention_utils, "_is_packed_sequence")
    monkeypatch.delattr(masking_utils, "find_packed_sequence_indices")
    monkeypatch.setattr(masking_utils, "_preprocess_mask_arguments", lambda *_: (True, None, *[None] * 5))
    assert Engine(network()).forward(input_ids=IDS, labels=IDS) == expected
    attention_mask._install.cache_clear()
