"""CoLA's and CR-Net's projections in the engine, in fp32, against numbers in fp64, on each ZeRO stage."""

import pytest
import torch
from torch import nn

from relora_ds.architectures.relora_cola import CoLALinear
from relora_ds.architectures.relora_crnet import CRNetLinear
from tests.parity import cases, given
from tests.ranks import ranks
from tests.vectors import vectors

COLA, CRNET = vectors("cola/vectors"), vectors("crnet/vectors")
LR, BETA1, EPS = 0.1, 0.9, 1.0  # with an eps this large a first step of Adam depends on the size of the gradient


class Projections(nn.Module):
    """One projection of several layers, whose inputs are given. Returns the outputs of all."""

    def __init__(self, first: nn.Linear, others: list[CRNetLinear]):
        super().__init__()
        self.first, self.others = first, nn.ModuleList(others)

    def forward(self, inputs):
        outputs = [self.first(inputs[0])]
        for layer, x in zip(self.others, inputs[1:], strict=True):
            outputs.append(layer(x, outputs[-1]))
        return tuple(outputs)


def with_values(model: nn.Module, values: dict) -> nn.Module:
    """A model with these parameters, and no others."""
    model.load_state_dict(values)
    return model


def trained(model, inputs, gradient, **how) -> dict:
    """On a rank: outputs, the gradient of the inputs, and what the engine holds after a step."""
    engine = given.engine_of(model, lr=LR, betas=(BETA1, 0.999), eps=EPS, **how)
    inputs = inputs.float().requires_grad_()
    outputs = given.step(engine, inputs, gradient.float())
    state, copies = cases.gathered_state(engine), cases.forward_copies(engine)
    cases.release(engine)
    outputs = [[y.detach() for y in ([each] if torch.is_tensor(each) else each)] for each in outputs]
    return {"outputs": outputs, "inputs": inputs.grad, "copies": copies, **state}


def check(model, inputs, gradient, outputs, gradients, **how) -> list[dict]:
    """Train a step and compare. outputs: of each layer. gradients: of every parameter, by name."""
    before = {name: p.detach().double() for name, p in model.named_parameters()}
    assert before.keys() == gradients.keys()
    results = ranks(2).run(trained, model, inputs, gradient, **how)
    for result in results:
        assert len(result["outputs"]) == how["accumulation"]
        for found in result["outputs"]:
            for layer, (y, expected) in enumerate(zip(found, outputs, strict=True)):
                given.close(y, expected, f"output {layer}")
        for name, expected in gradients.items():
            given.close(result["exp_avg"][name] / (1 - BETA1), expected, f"gradient of {name}")
            after = before[name] - LR * expected / (expected.abs() + EPS)
            for what in ("master", "copies"):
                given.close(result[what][name], after, f"{what} of {name}")
    return results


@pytest.mark.each_value_once
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_cola(stage, accumulation):
    model = with_values(CoLALinear(4, 5, 2), {"A": COLA["A"].t(), "B": COLA["B"].t()})
    gradients = {"A": COLA["dA"].t(), "B": COLA["dB"].t()}
    how = dict(stage=stage, accumulation=accumulation)
    results = check(model, COLA["X"], COLA["dY"], [COLA["Y"]], gradients, **how)
    given.close(sum(result["inputs"] for result in results) / 2, COLA["dX"], "gradient of the inputs")


@pytest.mark.each_value_once
@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_three_layers_of_crnet(stage, accumulation):
    values, gradients = {"first.weight": CRNET["W1"].t()}, {"first.weight": CRNET["dW1"].t()}
    for layer, beta in enumerate(CRNET["beta"]):
        of = f"others.{layer}"
        values |= {f"{of}.A": CRNET["A"][layer].t(), f"{of}.B": CRNET["B"][layer].t(), f"{of}.beta": beta[None]}
        gradients |= {f"{of}.{factor}": CRNET[f"d{factor}{layer + 2}"].t() for factor in "AB"}
        gradients[f"{of}.beta"] = torch.tensor([CRNET[f"dbeta{layer + 2}"]], dtype=torch.float64)
    model = Projections(nn.Linear(4, 5, bias=False), [CRNetLinear(4, 5, 2) for _ in CRNET["beta"]])
    outputs = [CRNET[f"Y{layer}"] for layer in (1, 2, 3)]
    how = dict(stage=stage, accumulation=accumulation)
    check(with_values(model, values), CRNET["X"], CRNET["dY3"], outputs, gradients, **how)
