"""ZeRO-3 and a loss that reads the head's weight without calling the head, as liger-kernel's fused loss does."""

import types

import pytest
import torch
from torch.nn import functional as F
from transformers.modeling_outputs import CausalLMOutputWithPast

import relora_ds
from relora_ds.models import recompute
from tests.parity import cases
from tests.ranks import ranks
from tests.small_models import FAMILIES, batch

STEPS = 7


class FusedLoss(torch.autograd.Function):
    """The mean loss, with both gradients computed in forward."""

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]
            loss = F.cross_entropy(leaves[0] @ leaves[1].t(), labels)
        gradients = torch.autograd.grad(loss, leaves)
        ctx.save_for_backward(*(gradient.detach() for gradient in gradients))
        return loss.detach()

    @staticmethod
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        return hidden.mul_(grad), weight.mul_(grad) if ctx.needs_input_grad[1] else None, None


def forward(self, input_ids, labels=None, **options):
    hidden = self.model(input_ids=input_ids, **options)[0]
    if not self.training:
        return CausalLMOutputWithPast(logits=self.lm_head(hidden))
    shifted = F.pad(labels, (0, 1), value=-100)[:, 1:].flatten()
    return CausalLMOutputWithPast(loss=FusedLoss.apply(hidden.flatten(0, 1), self.lm_head.weight, shifted))


def train(stage: int, fused: bool, family: str, precision: str, accumulation: int, mode: str, **relora) -> list[float]:
    """Losses of steps with restarts and an evaluation in between, and the logits' sum then."""
    config = cases.relora_config(restart_every=3, restart_warmup_steps=1, **relora)
    model = relora_ds.wrap(FAMILIES[family](), config)
    if fused:
        model.forward = types.MethodType(forward, model)
    engine, *_ = relora_ds.initialize(
        recompute.apply(model, mode),
        cases.ds_settings(stage, precision),
        config,
        lr=1e-2,
        total_steps=STEPS,
        precision=precision,
        gradient_accumulation_steps=accumulation,
        micro_batch_size=cases.GLOBAL_BATCH // (torch.distributed.get_world_size() * accumulation),
    )
    found = []
    for step in range(STEPS):
        found.append(cases.train_step(engine, step))
        if step in (1, 4):
            engine.eval()
            with torch.no_grad():
                found.append(engine(input_ids=batch(99, 4)).logits.double().pow(2).mean().item())
            engine.train()
    assert engine.restarts == [3, 6]
    cases.release(engine)
    return found


@pytest.mark.parametrize(
    "family, precision, accumulation, mode, relora",
    [
        ("llama", "fp32", 1, "none", {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("qwen2", "bf16", 2, "cheap", {}),  # one weight for embeddings and head
                ("llama", "fp32", 2, "full", {"trainable_modules": []}),
            )
        ),
    ],
)
def test_zero_3_gathers_the_heads_weight_and_reduces_its_gradient(family, precision, accumulation, mode, relora):
    how = (family, precision, accumulation, mode)
    expected = ranks(2).run(train, 1, False, *how, **relora)
    found = ranks(2).run(train, 3, True, *how, **relora)
    rel = 1e-4 if precision == "fp32" else 2e-2
    assert found[0] == found[1] == pytest.approx(expected[0], rel=rel)
