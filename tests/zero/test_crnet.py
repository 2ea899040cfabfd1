"""CR-Net on DeepSpeed: at every stage, with and without accumulation, the training of one plain process."""

import pytest
import torch
from torch.nn.utils import clip_grad_norm_

import relora_ds
from relora_ds.models import recompute
from tests.parity import cases
from tests.ranks import ranks
from tests.small_models import batch, crnet

STEPS, LR, DECAY, CLIP = 5, 3e-3, 0.1, 0.5
SHAPE = {"num_hidden_layers": 4, "num_key_value_heads": 1}


def train(stage: int, accumulation: int, mode: str = "none", precision: str = "fp32", zero: dict | None = None) -> dict:
    """On a rank: the losses and the weights."""
    model = crnet(**SHAPE)
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
    losses = [cases.train_step(engine, step) for step in range(STEPS)]
    weights = cases.gathered_state(engine)["master"]
    cases.release(engine)
    return {"losses": losses, "weights": weights}


@pytest.fixture(scope="module")
def reference() -> dict:
    """The same steps in plain PyTorch, one process, the whole batch."""
    model = crnet(**SHAPE)
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


@pytest.mark.parametrize(
    "stage, accumulation",
    [
        (1, 1),
        (3, 4),
        *(pytest.param(*each, marks=pytest.mark.slow) for each in ((0, 4), (2, 1), (2, 4), (0, 1), (1, 4), (3, 1))),
    ],
)
def test_two_ranks_train_as_one_plain_process(stage, accumulation, reference):
    found = ranks(2).run(train, stage, accumulation)[0]
    assert found["losses"] == pytest.approx(reference["losses"], rel=1e-5)
    assert found["losses"][-1] < found["losses"][0] - 0.01
    for name, weight in reference["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=1e-5)
    betas = torch.cat([weight for name, weight in found["weights"].items() if name.endswith("beta")])
    assert len(betas) == 21 and not (betas == 1).any(), "every one trains"


NONE_KEPT = {"stage3_param_persistence_threshold": 0}  # else parameters as small as these stay gathered


@pytest.mark.parametrize(
    "stage, accumulation, zero",
    [
        (3, 1, NONE_KEPT),
        *(pytest.param(*each, {}, marks=pytest.mark.slow) for each in ((0, 4), (1, 1), (2, 4), (3, 4))),
    ],
)
def test_what_is_found_in_backward_is_what_was_stored(stage, accumulation, zero):
    stored, found = (ranks(2).run(train, stage, accumulation, mode, zero=zero)[0] for mode in ("none", "inverted"))
    assert found["losses"][0] == stored["losses"][0] and found["losses"] == pytest.approx(stored["losses"], rel=1e-6)
    for name, weight in stored["weights"].items():
        torch.testing.assert_close(found["weights"][name], weight, rtol=1e-3, atol=1e-5)
