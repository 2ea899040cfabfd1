"""Activation checkpointing in one process: the numbers do not change, what is repeated and what is kept does."""

from collections import Counter

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import SelectiveCheckpointContext, checkpoint
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig

from relora_ds import ReLoRAConfig, wrap
from relora_ds.lowrank.base_format import Format
from relora_ds.lowrank.formats import DENSE, format_named
from relora_ds.lowrank.wrap import lowrank_layers
from relora_ds.models import recompute
from relora_ds.planning.activations import _LiveBytes
from tests.small_models import FAMILIES, batch

MODES = ["full", "selective", "cheap", "low_rank"]
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


def mixtral(**changes):
    config = MixtralConfig(
        vocab_size=67,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        use_cache=False,
    )
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def prepared(
    model,
    mode: str,
    *,
    relora: ReLoRAConfig | None,
    base: bool = True,
    format: Format = DENSE,
    product: str = "separate",
    trains_A: bool = True,
):
    """Wrapped, with B other than 0, stored in `format` and checkpointed."""
    if relora is not None:
        wrap(model, relora, base=base)
        generator = torch.Generator().manual_seed(1)
        for layer in lowrank_layers(model).values():
            torch.nn.init.normal_(layer.lora_B, std=0.1, generator=generator)
            layer.product = product
            layer.lora_A.requires_grad_(trains_A)
            if format is not DENSE:
                layer.store_weight(format.quantize(layer.weight.detach(), torch.float32), format, as_buffer=False)
    return recompute.apply(model.train(), mode)


def step(model) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients of one batch."""
    tokens = batch(0, 3)
    torch.manual_seed(0)
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(make, mode: str, **how) -> None:
    torch.manual_seed(0)
    loss, gradients = step(prepared(make(), "none", **how))
    torch.manual_seed(0)
    checkpointed = prepared(make(), mode, **how)
    assert checkpointed.is_gradient_checkpointing
    loss_then, gradients_then = step(checkpointed)
    assert torch.equal(loss, loss_then)
    assert gradients.keys() == gradients_then.keys() and gradients
    for name, gradient in gradients.items():
        assert torch.equal(gradient, gradients_then[name]), name


@pytest.mark.each_value_once
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_are_the_same_to_the_bit(family, attention, mode):
    def make():
        model = FAMILIES[family]()
        model.set_attn_implementation(attention)
        return model

    for relora in (
        ReLoRAConfig(r=4),
        ReLoRAConfig(r=4, lora_dropout=0.3),
        ReLoRAConfig(r=4, trainable_modules=[]),
        None,
    ):
        assert_same(make, mode, relora=relora)
    assert_same(make, mode, relora=ReLoRAConfig(r=4), base=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("format", ["int8", "fp8", "nf4", "bf16"])
def test_with_quantized_weights(format, mode):
    assert_same(
        lambda: FAMILIES["llama"](hidden_size=32, intermediate_size=64),
        mode,
        relora=ReLoRAConfig(r=4),
        format=format_named(format),
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("product, trains_A", [("folded", True), ("folded", False), ("separate", False)])
def test_folded_products_and_one_sided_layers(product, trains_A, mode):
    assert_same(FAMILIES["llama"], mode, relora=ReLoRAConfig(r=4), product=product, trains_A=trains_A)


@pytest.mark.parametrize("mode", MODES)
def test_a_mixture_of_experts(mode):
    assert_same(mixtral, mode, relora=ReLoRAConfig(r=4))


class Executed(TorchDispatchMode):
    """How often each operator runs inside of the block."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count[func.name()] += 1
        return func(*args, **(kwargs or {}))


def repeated(mode: str, relora: ReLoRAConfig | None, **how) -> tuple[Counter, int]:
    """What backward executes with checkpointing and not without it, and the number of layers."""
    counts = []
    for each in ("none", mode):
        model = FAMILIES["llama"]()
        model.set_attn_implementation("sdpa")
        model = prepared(model, each, relora=relora, **how)
        tokens = batch(0, 3)
        loss = model(input_ids=tokens, labels=tokens).loss
        with Executed() as executed:
            loss.backward()
        counts.append(executed.count)
    return counts[1] - counts[0], model.config.num_hidden_layers


@pytest.mark.parametrize("relora, product", [(ReLoRAConfig(r=4), "relora_ds::linear"), (None, "aten::mm")])
@pytest.mark.parametrize(
    "mode, products, attention", [("full", 7, 1), ("selective", 3, 0), ("cheap", 0, 0), ("low_rank", 7, 1)]
)
def test_what_is_repeated(mode, products, attention, relora, product):
    """Of seven linears a layer, selective keeps the first, third, fifth and seventh; cheap keeps all."""
    found, num_layers = repeated(mode, relora)
    if relora is None and products == 7:
        products -= 1  # the last one's inputs are all that backward needs: repetition ends before it
    assert (found[product], found[ATTENTION]) == (products * num_layers, attention * num_layers)
    assert found["aten::silu"] == num_layers and found["aten::rsqrt"] == 2 * num_layers
    if relora is not None:
        # the low-rank intermediates, unless it is these that are kept
        assert found["relora_ds::product"] == (0 if mode == "low_rank" else 7 * num_layers)


def test_no_folded_product_is_repeated_where_products_are_kept():
    found, num_layers = repeated("cheap", ReLoRAConfig(r=4), product="folded")
    assert (found["relora_ds::linear"], found["relora_ds::product"]) == (0, 7 * num_layers)


HIDDEN, FFN, HEADS, TOKENS = 64, 176, 4, 4 * 32


def kept_by_a_layer(mode: str, relora: ReLoRAConfig | None) -> float:
    """Bytes that one more layer keeps alive from forward to backward, in units of its input's."""
    kept = []
    for num_layers in (2, 3):
        with FakeTensorMode():
            config = LlamaConfig(
                hidden_size=HIDDEN,
                intermediate_size=FFN,
                num_hidden_layers=num_layers,
                num_attention_heads=HEADS,
                vocab_size=64,
                use_cache=False,
            )
            model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").train()
            if relora is not None:
                wrap(model, relora)
            recompute.apply(model, mode)
            tokens = torch.zeros(4, TOKENS // 4, dtype=torch.long)
            with _LiveBytes() as live:
                loss = model(input_ids=tokens, labels=tokens).loss
                kept.append(live.now)
            assert loss.requires_grad
    return (kept[1] - kept[0]) / (TOKENS * HIDDEN * 4)


@pytest.mark.parametrize("relora", [ReLoRAConfig(r=8), None], ids=["relora", "full rank"])
def test_what_is_kept(relora):
    kept = {mode: kept_by_a_layer(mode, relora) for mode in ("none", *MODES)}
    ffn, logsumexp = FFN / HIDDEN, HEADS / HIDDEN
    assert kept["full"] == 1  # the layer's input
    assert kept["low_rank"] == 1 + (0 if relora is None else 7 * relora.r / HIDDEN)
    # ... and q, v, gate, down and attention with its log-sum-exp
    assert kept["selective"] == 1 + 3 + ffn + 1 + logsumexp
    # ... and k, o and up as well
    assert kept["cheap"] == 1 + 5 + 2 * ffn + 1 + logsumexp
    assert kept["cheap"] < 0.6 * kept["none"]


def test_frozen_embeddings_get_no_gradient():
    """transformers asks for one with checkpointing, which would be computed for nothing."""
    model = prepared(FAMILIES["llama"](), "full", relora=ReLoRAConfig(r=4, trainable_modules=[]))
    assert not model.get_input_embeddings()(batch(0, 1)).requires_grad


def test_evaluation_is_not_checkpointed():
    model = prepared(FAMILIES["llama"](), "full", relora=ReLoRAConfig(r=4)).eval()
    tokens = batch(0, 3)
    loss = model(input_ids=tokens, labels=tokens).loss
    with Executed() as executed:
        loss.backward()
    assert not executed.count["relora_ds::linear"]


def test_a_model_that_does_not_support_it_is_refused():
    model = FAMILIES["llama"]()
    assert recompute.problems(model, "cheap") == []
    model.supports_gradient_checkpointing = False
    assert recompute.problems(model, "none") == []
    (problem,) = recompute.problems(model, "cheap")
    assert problem.startswith("activation_checkpointing: cheap is not supported by transformers' llama models; use ")
    with pytest.raises(ValueError, match="activation_checkpointing: cheap"):
        recompute.apply(model, "cheap")


@pytest.mark.parametrize("name", sorted(recompute.PRODUCTS | recompute.ATTENTION))
def test_torch_has_the_operators(name):
    library, _, operator = name.partition("::")
    assert getattr(getattr(torch.ops, library), operator).default.name() == name


class Attends(torch.nn.Module):
    """A layer whose attention is an operator of a library."""

    def __init__(self, operator):
        super().__init__()
        self.operator = operator

    def forward(self, x):
        return (self.operator(x.sin()) + 1).cos()


@pytest.mark.parametrize("mode", ["selective", "cheap"])
@pytest.mark.parametrize(
    "namespace, executed",
    [("flash_attn", 1), ("flash_attn_3", 1), ("_vllm_flash_attn3_1a2b3c4", 1), ("sageattention", 1), ("other", 2)],
)
def test_attention_of_other_libraries_is_not_repeated(namespace, executed, mode):
    calls = []

    def attend(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return x * 2

    operator = torch.library.custom_op(f"{namespace}::{mode}_varlen_fwd", attend, mutates_args=())
    operator.register_autograd(lambda context, grad: grad * 2)
    x = torch.randn(3, requires_grad=True)
    checkpoint(Attends(operator), x, use_reentrant=False, context_fn=lambda: recompute._contexts(mode)).sum().backward()
    assert len(calls) == executed
    torch.testing.assert_close(x.grad, -(2 * x.sin() + 1).sin() * 2 * x.cos())


def test_the_repetition_is_asked_the_same_where_torch_asks_again():
    """Some versions of torch do; a decoder layer has an odd number of large products."""
    forward, _ = recompute._contexts("selective")
    policy, product = forward.mode.policy_fn, torch.ops.aten.mm.default
    operand = torch.empty(2, 2)

    def decisions(is_recompute):
        context = SelectiveCheckpointContext(is_recompute=is_recompute)
        return [policy(context, product, operand, operand) for _ in range(7)]

    assert decisions(False) == decisions(True) and len(set(decisions(False))) == 2
