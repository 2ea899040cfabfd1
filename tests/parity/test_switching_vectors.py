"""SwitchLoRA in the engine, in fp32, against numbers of a plain program in fp64, on each ZeRO stage.

The engine chooses what the vectors choose: its first switch is of row 0 of A and column 1 of B, against the first
candidates. Given to it are the values of the factors and candidates, which it would draw, and the step of the switch,
which depends on a random number.

Not here are sizes of initial factors and the schedule: they are formulas of shapes as large as those of real models,
and of a step's number, and `tests/lowrank/test_switching.py` has them.
"""

import math

import pytest
import torch
from torch import nn

import relora_ds
from relora_ds.config.switch_config import SwitchLoRAConfig
from relora_ds.lowrank import switching
from tests.parity import cases, given
from tests.parity.switching import BETAS, relora
from tests.ranks import ranks
from tests.vectors import vectors

SWITCH, ADAM = (vectors("switchlora/vectors")[name] for name in ("switch", "adam_after_freeze"))
FREEZE = int(ADAM["freeze"])
SWITCHED_AFTER, STEPS = 3, 3 + len(ADAM["updates_over_lr"])
LR, EPS = 1e-9, 1e-12  # steps that leave gradients as they are, of Adam without an eps


class Linear(nn.Module):
    """A linear whose weight is `W + s·B·A`."""

    def __init__(self, lora_A, lora_B):
        super().__init__()
        self.linear = nn.Linear(lora_A.shape[1], len(lora_B), bias=False)
        self.linear.weight.data.copy_(SWITCH["W"] + SWITCH["s"] * lora_B @ lora_A)

    def forward(self, x):
        return self.linear(x)


def trained(lora_A, lora_B, **how) -> dict:
    """On a rank: masters and moments of A and B, W, and the function of X, each `[STEPS, ...]`, after the steps."""
    firsts = {"A": lora_A, "B": lora_B}
    firsts["candidates of A"], firsts["candidates of B"] = (
        SWITCH[name][None] for name in ("candidate_row_of_A", "candidate_column_of_B")
    )

    def drawn(rows, columns, std, key):
        value, first = torch.full((rows, columns), math.nan), firsts[key.rpartition("/")[2]]
        value[: len(first)] = first
        return value

    def num_switched(expected, key):
        return int(key.split("/")[-2] == str(SWITCHED_AFTER))

    config = relora(r=len(lora_A), target_modules=["linear"], frozen_dtype="fp32")
    model = relora_ds.wrap(Linear(lora_A, lora_B), config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(switching, "drawn", drawn)
        patch.setattr(switching, "num_switched", num_switched)
        engine = given.engine_of(model, lr=LR, eps=EPS, switching=SwitchLoRAConfig(freeze_steps=FREEZE), **how)
        assert next(iter(engine.frozen.layers.values())).scaling == SWITCH["s"]
        seen = [after_a_step(engine) for _ in range(STEPS)]
    cases.release(engine)
    return stacked(seen)


def after_a_step(engine) -> dict:
    given.step(engine, torch.eye(SWITCH["W"].shape[1]), SWITCH["G_of_W"].t().float())
    with torch.no_grad():
        function = engine(SWITCH["X"].float())
    state = cases.gathered_state(engine)
    of_A, of_B = ({what: values[f"linear.lora_{factor}"] for what, values in state.items()} for factor in "AB")
    return {"A": of_A, "B": of_B, "W": {"master": cases.stored_weights(engine)["linear"]}, "function": function}


def stacked(seen: list):
    """Tensors of all steps from dictionaries of each step."""
    if torch.is_tensor(seen[0]):
        return torch.stack(seen)
    return {key: stacked([each[key] for each in seen]) for key in seen[0]}


def check_moments(result: dict, of: str, before, after, reset: bool) -> None:
    """Compare the moments of a vector after each step, `result["exp_avg"]` and `["exp_avg_sq"]`.

    before, after: its gradients before and after the switch.
    reset: whether it begins anew, after the freeze; else the gradients are equal.
    """
    for what, beta, power, atol in (("exp_avg", BETAS[0], 1, 1e-8), ("exp_avg_sq", BETAS[1], 2, 1e-12)):
        for t, found in enumerate(result[what], 1):
            is_new = reset and t > SWITCHED_AFTER
            count = max(0, t - SWITCHED_AFTER - FREEZE) if is_new else t
            expected = (1 - beta**count) * (after if is_new else before) ** power
            given.close(found, expected, f"{what} of {of} after step {t}", atol)


@pytest.mark.each_value_once
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_switch(stage, accumulation):
    """W, A, B, the function, and moments that are kept and reset, through the freeze and after it."""
    results = ranks(2).run(trained, SWITCH["A"], SWITCH["B"], stage=stage, accumulation=accumulation)
    for result in results:
        for t in range(1, STEPS + 1):
            is_after = t >= SWITCHED_AFTER
            for name in ("A", "B", "W"):
                expected = SWITCH[f"{name}_after" if is_after else name]
                given.close(result[name]["master"][t - 1], expected, f"{name} after step {t}")
            expected = SWITCH["Y_after" if is_after else "Y_before"]
            given.close(result["function"][t - 1], expected, f"the function after step {t}")
        s, gradient, resets = SWITCH["s"], SWITCH["G_of_W"], SWITCH["reset_moments_and_freeze"]
        for i in range(len(SWITCH["A"])):
            before, after = (s * SWITCH[name][:, i] @ gradient for name in ("B", "B_after"))
            if i == SWITCH["row"]:
                before, after = SWITCH["dA_row0_before"], SWITCH["dA_row0_after"]
            of_row = {what: value[:, i] for what, value in result["A"].items()}
            check_moments(of_row, f"row {i} of A", before, after, i in resets["A_rows"])
            before, after = (s * gradient @ SWITCH[name][i] for name in ("A", "A_after"))
            of_column = {what: value[:, :, i] for what, value in result["B"].items()}
            check_moments(of_column, f"column {i} of B", before, after, i in resets["B_columns"])


@pytest.mark.each_value_once
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_adam_after_the_freeze(stage, accumulation):
    """Its steps, of vectors that begin with 0: near it fp32 has the digits of steps this small."""
    lora_A, lora_B, G = SWITCH["A"].clone(), SWITCH["B"].clone(), SWITCH["G_of_W"]
    lora_A[1], lora_B[:, 0] = 0, 0
    results = ranks(2).run(trained, lora_A, lora_B, stage=stage, accumulation=accumulation)
    for result in results:
        for values, gradient in (
            (result["A"]["master"][:, 1], SWITCH["candidate_column_of_B"] @ G),
            (result["B"]["master"][:, :, 0], G @ SWITCH["candidate_row_of_A"]),
        ):
            updates = values[SWITCHED_AFTER - 1 :].diff(dim=0) / LR
            assert (values[SWITCHED_AFTER - 1] != 0).all()
            given.close(updates, -ADAM["updates_over_lr"][:, None] * gradient.sign(), "updates / lr")
