"""Steps of an engine on gradients that are given: those of a model's output."""

import torch
import torch.distributed as dist
from torch import Tensor

import relora_ds
from tests.parity.cases import ds_settings


def engine_of(model, *, stage: int, accumulation: int, **how):
    """An engine in fp32 that neither clips nor changes its learning rate."""
    engine, *_ = relora_ds.initialize(
        model,
        # Else ZeRO-3 keeps parameters as small as these on every rank.
        ds_settings(stage, "fp32", stage3_param_persistence_threshold=0),
        total_steps=100,
        schedule="constant",
        precision="fp32",
        gradient_accumulation_steps=accumulation,
        max_grad_norm=0.0,
        **how,
    )
    return engine


def step(engine, inputs: Tensor, gradient: Tensor) -> list:
    """Take a step and return the outputs of this rank's micro-batches.

    gradient: of the output, or of its last tensor. It is the mean over the micro-batches of all ranks, which have
    `1, 2, 3, ...` parts of it, so that the mean of no rank is right.
    """
    accumulation, outputs = engine.gradient_accumulation_steps(), []
    count = accumulation * dist.get_world_size()
    for micro in range(accumulation):
        share = 2 * (1 + micro + accumulation * dist.get_rank()) / (count + 1)
        output = engine(inputs)
        last = output if isinstance(output, Tensor) else output[-1]
        engine.backward((last * gradient).sum() * share)
        engine.step()
        outputs.append(output)
    return outputs


def close(found: Tensor, expected: Tensor, what: str, atol: float = 1e-5) -> None:
    assert torch.is_tensor(found) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=atol, msg=lambda text: f"{what}: {text}")
