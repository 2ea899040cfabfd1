"""What runs on the ranks in the tests of one-sided chains against vectors: one linear, and a loss known by hand."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

import relora_ds
from relora_ds.config import ReLoRAConfig
from relora_ds.zero import subspaces
from tests.parity.cases import ds_settings, release


class LeastSquares(nn.Module):
    """`‖X Wᵀ − Y‖² / (2 b)`."""

    def __init__(self, weight):
        super().__init__()
        self.linear = nn.Linear(*reversed(weight.shape), bias=False)
        self.linear.weight.data.copy_(weight)

    def forward(self, x, y):
        return (self.linear(x) - y).pow(2).sum() / (2 * len(x))


class Given(LeastSquares):
    """`Σ W∘G`: W's gradient is G. x: the identity; y: `Gᵀ`, in as many rows as x."""

    def forward(self, x, y):
        return (self.linear(x) * y).sum()


def build(stage, kind, weight, Q, *, lr, eps, T, steps, scaling=1.0, accumulation=1, weight_decay=0.0, **relora):
    """An engine that trains C of `W + s·C·Q` at a constant learning rate, with AdamW and without clipping."""
    r = len(Q)
    settings = dict(optimizer_reset="none", restart_warmup_steps=0, trainable_modules=[])
    config = ReLoRAConfig(
        r=r,
        lora_alpha=r * scaling,
        trains="B",
        restart_every=T,
        restart_init="gradient",
        target_modules=["linear"],
        **{**settings, **relora},
    )
    model = relora_ds.wrap(kind(weight), config)
    model.linear.lora_A.data.copy_(Q)
    engine, *_ = relora_ds.initialize(
        model=model,
        config=ds_settings(stage, "fp32"),
        lr=lr,
        eps=eps,
        weight_decay=weight_decay,
        total_steps=steps,
        min_lr_ratio=1.0,
        precision="fp32",
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
    )
    return engine


def step(engine, x, y) -> torch.Tensor:
    """One optimizer step on this rank's rows, as many for every micro-batch; returns W after it, on the CPU."""
    rank, parts = dist.get_rank(), dist.get_world_size()
    rows = [part.chunk(parts)[rank].float() for part in (x, y)]
    for micro_x, micro_y in zip(*(part.chunk(engine.gradient_accumulation_steps()) for part in rows), strict=True):
        engine.backward(engine(micro_x, micro_y))
        engine.step()
    merged = engine.collect_merged()
    found = [None if merged is None else merged["linear.weight"].cpu()]
    dist.broadcast_object_list(found)
    return found[0]


def least_squares(case, bases=None, **how) -> dict:
    """Train on a case of `fixtures/galore/lsq.json`.

    bases: Q of every cycle; None: the first is given, and the engine chooses the others.
    """
    engine = build(kind=LeastSquares, weight=case["W0"], T=case["T"], steps=len(case["W"]), **how)
    with pytest.MonkeyPatch.context() as patch:
        if bases is not None:
            given = iter(bases[1:])
            patch.setattr(subspaces, "dominant_rows", lambda gradient, r: next(given).float())
        weights = [step(engine, case["X"], case["Y"]) for _ in case["W"]]
    result = {"weights": torch.stack(weights), "restarts": list(engine.restarts)}
    release(engine)
    return result


def given_gradients(case, stage) -> torch.Tensor:
    """W after every step of a case of `fixtures/galore/given_gradients.json`, with its bases."""
    bases = list(case["basis"].values())
    settings = dict(lr=case["alpha"] * case["lr"], eps=case["eps"], T=case["T"], steps=len(case["G"]))
    engine = build(stage, Given, case["W0"], bases[0], **settings)
    identity, weights = torch.eye(case["n"]), []
    with pytest.MonkeyPatch.context() as patch:
        given = iter(bases[1:])
        patch.setattr(subspaces, "dominant_rows", lambda gradient, r: next(given).float())
        for G in case["G"]:
            # Ranks average their gradients: each has its rows of the identity, and G as many times.
            weights.append(step(engine, identity, dist.get_world_size() * G.T))
    release(engine)
    return torch.stack(weights)
