"""CoLA on DeepSpeed: at every stage the training of one plain process, and CoLA-M's steps are CoLA's to the bit."""

import pytest
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch.nn.utils import clip_grad_norm_

import relora_ds
from relora_ds.models import recompute
from relora_ds.zero.traffic import count_traffic
from tests.parity import cases
from tests.ranks import ranks
from tests.small_models import batch, cola

STEPS, LR, DECAY, CLIP = 5, 1e-2, 0.1, 0.5
# Nothing is kept for its next use, nothing is fetched before it is needed.
TIGHT = {
    "stage3_max_live_parameters": 1,
    "stage3_max_reuse_distance": 1,
    "stage3_prefetch_bucket_size": 0,
    "stage3_param_persistence_threshold": 0,
}
NONE_KEPT = {"stage3_param_persistence_threshold": 0}  # else parameters as small as these stay gathered
PREFETCH = {**TIGHT, "stage3_max_live_parameters": 4000, "stage3_prefetch_bucket_size": 3000}


def train(
    stage: int, mode: str = "none", precision: str = "fp32", zero: dict | None = None, accumulation: int = 2, **changes
) -> dict:
    """On a rank: the losses, the weights, and the last step's bytes."""
    model = cola(**changes)
    model.set_attn_implementation("sdpa")
    engine, *_ = relora_ds.initialize(
        recompute.apply(model, mode),
        cases.ds_settings(stage, precision, **(zero or {})),
        lr=LR,
        total_steps=STEPS,
        schedule="constant",
        weight_decay=DECAY,
        max_grad_norm=CLIP,
        precision=precision,
        micro_batch_size=cases.GLOBAL_BATCH // (2 * accumulation),
        gradient_accumulation_steps=accumulation,
    )
    losses = []
    for step in range(STEPS):
        with count_traffic() as traffic:
            losses.append(cases.train_step(engine, step))
    held = [
        name
        for name, p in engine.module.named_parameters()
        if getattr(p, "ds_status", None) == ZeroParamStatus.AVAILABLE and not p.ds_persist
    ]
    weights = cases.gathered_state(engine)["master"]
    cases.release(engine)
    return {"losses": losses, "weights": weights, "payload": traffic.payload, "held": held}


@pytest.fixture(scope="module")
def reference() -> dict:
    """The same steps in plain PyTorch, one process, the whole batch."""
    model = cola()
    matrices, vectors = ([p for p in model.parameters() if (p.ndim == 1) == is_vector] for is_vector in (False, True))
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer, losses = torch.optim.AdamW(groups, lr=LR), []
    for step in range(STEPS):
        tokens = batch(step, cases.GLOBAL_BATCH)
        loss = model(input_ids=tokens, labels=tokens).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
    return {"losses": losses, "weights": {name: p.detach() for name, p in model.named_parameters()}}


@pytest.mark.each_value_once
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    "stage", [pytest.param(0, marks=pytest.mark.slow), 1, pytest.param(2, marks=pytest.mark.slow), 3]
)
def test_two_ranks_train_as_one_plain_process(stage, accumulation, reference):
    found = ranks(2).run(train, stage, accumulation=accumulation)[0]
    assert found["losses"] == pytest.approx(reference["losses"], rel=1e-5)
    assert found["losses"][-1] < found["losses"][0] - 0.1
    for name, weight in reference["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=1e-5)


def same(stage: int, **how) -> tuple[dict, dict]:
    """CoLA's steps and CoLA-M's, which have to be equal to the bit."""
    plain, recomputed = (ranks(2).run(train, stage, mode, **how)[0] for mode in ("none", "low_rank"))
    assert recomputed["losses"] == plain["losses"] and not recomputed["held"]
    for name, weight in plain["weights"].items():
        assert torch.equal(weight, recomputed["weights"][name]), name
    return plain, recomputed


@pytest.mark.parametrize(
    "stage, precision, zero",
    [
        (3, "fp32", NONE_KEPT),
        pytest.param(3, "fp32", TIGHT, marks=pytest.mark.slow),
        pytest.param(0, "fp32", {}, marks=pytest.mark.slow),
        pytest.param(1, "fp32", {}, marks=pytest.mark.slow),
        pytest.param(1, "bf16", {}, marks=pytest.mark.slow),
        pytest.param(2, "fp32", {}, marks=pytest.mark.slow),
        pytest.param(3, "bf16", NONE_KEPT, marks=pytest.mark.slow),
        pytest.param(3, "fp32", PREFETCH, marks=pytest.mark.slow),
    ],
)
def test_cola_m_takes_colas_steps(stage, precision, zero):
    plain, recomputed = same(stage, precision=precision, zero=zero, num_key_value_heads=1)
    lets_go = zero.get("stage3_max_live_parameters") == 1
    assert (recomputed["payload"] > plain["payload"]) == lets_go, "else ZeRO-3 still has them, for backward"
