"""Engines are built without values and filled one tensor at a time; what they hold is exactly what the source has."""

import pytest
import torch

from relora_ds.zero.weights import NOTHING
from tests.parity import cases
from tests.ranks import ranks
from tests.small_models import llama, qwen2
from tests.zero import filled
from tests.zero.restarts import BLOCKS


@pytest.mark.each_value_once
@pytest.mark.parametrize(
    "stage, precision, how",
    [
        (0, "fp32", {}),
        (0, "bf16", {"family": "qwen2"}),
        (1, "fp32", {"spread": True}),
        (1, "bf16", {"spread": True, "family": "qwen2"}),
        (2, "bf16", {"family": "gpt_neox"}),
        (3, "fp32", {"family": "qwen2"}),
        (3, "bf16", {"spread": True}),
        (1, "bf16", {"offload": "optimizer"}),
        (3, "bf16", {"offload": "optimizer"}),
        (3, "bf16", {"offload": "parameters"}),
        (1, "bf16", {"base": False}),
        (3, "fp32", {"base": False}),
    ],
)
def test_a_model_without_values_is_filled_from_a_source(stage, precision, how):
    ranks(2).run(filled.from_a_source, stage, precision, **how)


@pytest.mark.parametrize(
    "stage, frozen",
    [
        (1, dict(frozen_dtype="int8")),
        (3, dict(frozen_dtype="nf4")),
        pytest.param(3, dict(frozen_dtype="fp8"), marks=pytest.mark.slow),
        (3, dict(frozen_dtype="int8", frozen_placement="replicated")),
        (1, dict(frozen_dtype="bf16", frozen_master="none")),
        pytest.param(3, dict(frozen_dtype="nf4", frozen_master="none"), marks=pytest.mark.slow),
        pytest.param(2, dict(frozen_master="device"), marks=pytest.mark.slow),
        (3, dict(frozen_placement="replicated")),
        pytest.param(3, dict(trains="B", restart_init="random"), marks=pytest.mark.slow),
        (3, dict(trains="B", restart_init="random", frozen_dtype="int8", frozen_placement="replicated")),
    ],
)
def test_frozen_weights_in_every_format(stage, frozen):
    ranks(2).run(filled.from_a_source, stage, "bf16", relora=cases.relora_config(**frozen), spread=stage == 3, **BLOCKS)


@pytest.mark.parametrize("stage", [1, 3])
def test_what_is_frozen_for_good(stage):
    relora = cases.relora_config(trainable_modules=["norms"])
    ranks(2).run(filled.from_a_source, stage, "bf16", family="qwen2", relora=relora)


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("stage", [1, 3])
def test_any_number_of_ranks(stage, world_size):
    ranks(world_size).run(filled.from_a_source, stage, "bf16", spread=True)


@pytest.mark.parametrize("stage", [1, 3])
def test_tensors_are_sent_in_pieces(stage):
    ranks(2).run(filled.in_pieces, stage)


@pytest.mark.parametrize(
    "stage, precision, inside, source",
    [(3, "fp32", False, False), (3, "bf16", True, False), (3, "bf16", False, True), (1, "bf16", False, False)],
)
def test_a_model_built_under_zero_init(stage, precision, inside, source):
    ranks(2).run(filled.partitioned, stage, precision, inside, source)


@pytest.mark.parametrize("stage", [1, 3])
def test_no_rank_holds_more_than_its_state_and_a_tensor(stage):
    results = ranks(2).run(filled.live_while_filled, stage)
    assert sum(result["num_read"] for result in results) == 30
    for result in results:
        assert result["peak"] <= result["built"] + 2 * result["largest"]


def read_of_one_rank_fails(stage) -> str:
    source = filled.Weights(llama())
    source.owners = {"model.norm.weight": 1}
    read = source.read
    source.read = lambda name: read(name + "?") if name == "model.norm.weight" else read(name)
    with pytest.raises(ValueError) as error:
        filled.engine_of(filled.without_values(llama()), None, stage, "fp32", weights=source)
    return str(error.value)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_tensor_that_one_rank_cannot_read_ends_all_ranks(stage):
    for message in ranks(2).run(read_of_one_rank_fails, stage):
        assert message == (
            "weights: rank 1: ValueError: model.norm.weight cannot be read (KeyError: 'model.norm.weight?')"
        )


def buffers_of_rank(model, rank: int):
    """The model with two buffers whose values depend on the rank; one is saved with it."""
    model.model.register_buffer("bias", torch.tensor([rank + 0.1, 2.0], dtype=torch.float64))
    model.model.register_buffer("mask", torch.tensor(rank == 0), persistent=False)
    return model


def fill_buffers(stage, given: bool) -> dict:
    """given: from a source; else from what rank 0's model has."""
    rank = torch.distributed.get_rank()
    model = buffers_of_rank(llama(), rank)
    weights = filled.Weights(buffers_of_rank(llama(), 5)) if given else None
    engine = filled.engine_of(filled.without_values(model) if given else model, None, stage, "bf16", weights=weights)
    found = {name: engine.module.get_buffer(f"model.{name}").clone() for name in ("bias", "mask")}
    cases.release(engine)
    return found


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("given", [True, False])
def test_buffers_are_filled_and_the_same_on_all_ranks(stage, given):
    for found in ranks(2).run(fill_buffers, stage, given):
        torch.testing.assert_close(found["bias"], torch.tensor([5.1 if given else 0.1, 2.0]))
        assert found["mask"].item() is True


def refused(what: str) -> str:
    model, weights = filled.without_values(llama()), filled.Weights(llama())
    if what == "no source":
        weights = None
    elif what == "lacks":
        del weights.shapes["model.norm.weight"]
    elif what == "shape":
        weights = filled.Weights(llama(vocab_size=70))
    elif what == "buffers":
        model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq.to("meta")
    elif what == "ranks":
        weights.owners = {"model.norm.weight": 7, "lm_head.weight": 1}
    elif what == "values":
        weights.values["lm_head.weight"] = weights.values["lm_head.weight"].to("meta")
    elif what == "nothing":
        weights.read = lambda name: None
    elif what == "tied":
        model = filled.without_values(qwen2())
        weights = filled.Weights(qwen2(tie_word_embeddings=False))
        weights.values["lm_head.weight"] += 1
    with pytest.raises(ValueError) as error:
        filled.engine_of(model, None, 1, "fp32", weights=weights)
    return str(error.value)


@pytest.mark.parametrize(
    "what, message",
    [
        (
            "no source",
            "model: 30 of its parameters are on the meta device (the first: model.embed_tokens.weight) and have "
            "no values; pass weights=, a source of them (relora_ds.zero.weights)",
        ),
        (
            "lacks",
            "weights: missing model.norm.weight, unexpected none, of another shape none; they are of another model",
        ),
        (
            "shape",
            "weights: missing none, unexpected none, of another shape model.embed_tokens.weight (70, 20) instead of "
            "(67, 20), lm_head.weight (70, 20) instead of (67, 20); they are of another model",
        ),
        (
            "buffers",
            "model: 1 of its buffers are on the meta device (the first: model.rotary_emb.inv_freq) and have no "
            "values, which no source of weights has; leave only parameters there, as "
            "accelerate.init_empty_weights(include_buffers=False) does",
        ),
        ("ranks", "weights: of ranks that do not exist model.norm.weight; spread them over 2 rank(s)"),
        (
            "values",
            "weights: rank 0: ValueError: lm_head.weight cannot be read (NotImplementedError: Cannot copy out of "
            "meta tensor; no data!)",
        ),
        (
            "nothing",
            "weights: rank 0: ValueError: model.layers.0.self_attn.q_proj.weight cannot be read (AttributeError: "
            "'NoneType' object has no attribute 'detach')",
        ),
        (
            "tied",
            "weights: rank 0: ValueError: model.embed_tokens.weight and lm_head.weight differ, but share one tensor "
            "in this model; set tie_word_embeddings to false in its configuration",
        ),
    ],
)
def test_what_cannot_be_filled_is_refused_in_one_line(what, message):
    assert ranks(2).run(refused, what) == [message, message]


def after_a_backward_pass(stage, precision, before: bool) -> float:
    """The loss of the second step."""
    model = llama()
    if before:
        tokens = torch.ones(1, 4, dtype=torch.long)
        model(input_ids=tokens, labels=tokens).loss.backward()
    engine = filled.engine_of(model, None, stage, precision)
    losses = [cases.train_step(engine, step) for step in range(2)]
    cases.release(engine)
    return losses[-1]


@pytest.mark.parametrize("stage, precision", [(0, "fp32"), (1, "bf16"), (3, "fp32")])
def test_gradients_of_a_pass_before_training_do_not_count(stage, precision):
    with_pass, without = (ranks(2).run(after_a_backward_pass, stage, precision, before) for before in (True, False))
    assert with_pass == without


def without_a_source(stage) -> None:
    engine = filled.engine_of(filled.without_values(llama()), None, stage, "fp32", weights=NOTHING)
    cases.release(engine)


@pytest.mark.parametrize("stage", [0, 3])
def test_what_a_checkpoint_is_loaded_into_needs_no_source(stage):
    ranks(2).run(without_a_source, stage)
