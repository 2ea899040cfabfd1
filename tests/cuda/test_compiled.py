"""Compiled training on a GPU: the same losses, and attention without a mask, by a kernel that needs none."""

import pytest
import torch

import relora_ds
from relora_ds.models import compilation
from relora_ds.zero import attention_mask
from relora_ds.zero.subspaces import takes_gradients_along
from tests.cuda.gpus import on_gpus, real_gpu
from tests.parity import cases
from tests.small_models import batch, llama
from tests.zero.test_attention_mask import compiled_forwards

pytestmark = real_gpu
MASKLESS = ("flash", "cudnn")  # of torch's kernels of attention


def train(compiled: bool, searches: bool = False, residual: bool = False) -> dict:
    """Losses of five steps in bf16 with a restart after the third, and the kernels of attention of one more forward.

    searches: transformers looks for packed documents as it is written.
    residual: a one-sided chain that adds up whole gradients, and restarts by one of them.
    """
    torch._dynamo.reset()
    relora = cases.relora_config(restart_every=3, restart_warmup_steps=1)
    if residual:
        chain = dict(restart_every=3, restart_warmup_steps=1, restart_init="gradient", gradient_estimate="exact")
        relora = cases.one_sided_config(**chain, residual_every=3)
    model = llama(hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    model.set_attn_implementation("sdpa")
    engine, *_ = relora_ds.initialize(
        relora_ds.wrap(model, relora),
        cases.ds_settings(1, "bf16"),
        relora,
        lr=1e-2,
        total_steps=cases.STEPS,
        precision="bf16",
        micro_batch_size=cases.GLOBAL_BATCH,
    )
    with pytest.MonkeyPatch.context() as patched:
        if searches:
            patched.setattr(attention_mask, "_counts_positions", lambda *_: False)
        if compiled:
            compilation.apply(engine.module, unless=lambda: takes_gradients_along(engine))
        losses = [cases.train_step(engine, step) for step in range(5)]
        assert engine.restarts == [3]
        tokens = batch(9, cases.GLOBAL_BATCH).to(engine.device)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            engine(input_ids=tokens, labels=tokens)
    kernels = {event.name for event in profile.events() if "scaled_dot_product" in event.name}
    cases.release(engine)
    return {"losses": losses, "kernels": sorted(kernels)}


def without_mask(kernels: list[str]) -> bool:
    return any(name in kernel for kernel in kernels for name in MASKLESS) and not any(
        "efficient" in kernel or "math" in kernel for kernel in kernels
    )


def test_no_mask_reaches_the_compiled_attention():
    (found,) = on_gpus(1, compiled_forwards)
    assert found["first masks"] == [(True, True)] * 2


def test_the_compiled_engine_computes_the_same_without_a_mask():
    (plain,), (compiled,) = on_gpus(1, train, False), on_gpus(1, train, True)
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=2e-2)
    assert without_mask(plain["kernels"]), plain["kernels"]
    assert without_mask(compiled["kernels"]), compiled["kernels"]


def test_a_compiled_chain_adds_gradients_up():
    (plain,), (compiled,) = (on_gpus(1, train, compiled, residual=True) for compiled in (False, True))
    assert compiled["losses"] == pytest.approx(plain["losses"], rel=2e-2)


def test_with_the_search_it_has_another_kernel():
    """What is gained: else the search could stay."""
    (found,) = on_gpus(1, train, True, searches=True)
    assert not any("flash" in kernel for kernel in found["kernels"]), found["kernels"]
