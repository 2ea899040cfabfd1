"""The numbers of a logged step: what the console shows and metrics.jsonl keeps."""

import resource
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from relora_ds.lowrank.owned_layer import OwnedLayer
from relora_ds.lowrank.wrap import count_parameters, full_shape, lowrank_layers
from relora_ds.models.flops import flops_per_token, has_experts, peak_flops
from relora_ds.training.state import RunState
from relora_ds.training.step import Step
from relora_ds.zero.moments import max_update_over_lr

UPDATE_STEPS = 10  # after a restart: for so many steps the size of the updates is a figure


def is_shown(run: RunState) -> bool:
    """Return True if the step that the run is at is one of those for the console."""
    return run.step % run.recipe.log.every == 0 or run.step == run.recipe.total_steps


def figures_of(run: RunState, step: Step) -> dict[str, Any] | None:
    """Return the figures of an applied step, or None if it is not logged. Collective, and waits for the device.

    After a restart every step is logged: its first updates are where a bad reset shows.
    """
    engine, totals = run.engine, run.totals
    after_restart = bool(engine.restarts) and 0 < engine.t - engine.restarts[-1] <= UPDATE_STEPS
    if not (is_shown(run) or after_restart):
        return None
    tokens_per_s = run.recipe.tokens_per_step / run.clock.mean_seconds()
    extra = {"max_update_over_lr": _max_update_over_lr(run)} if after_restart else {}
    if engine.residual is not None:
        extra |= {"residual_updates": engine.residual.count, "residual_s": engine.residual.seconds}
    return {
        "loss": run.collect_losses(),
        "lr": step.lr,
        "grad_norm": float(engine.get_global_grad_norm()),
        "tokens": totals.tokens,
        "tokens_per_s": tokens_per_s,
        "step_s": run.clock.newest,
        "mfu": mfu(run, tokens_per_s),
        "bytes_payload": run.step_bytes.payload,
        "bytes_wire": run.step_bytes.wire,
        "total_bytes_wire": totals.bytes_wire,
        "full_rank_bytes_wire": totals.full_rank_wire,
        "peak_memory_bytes": peak_memory(engine.device),
        "restarts": totals.restarts,
        **extra,
    }


def mfu(run: RunState, tokens_per_s: float) -> float | None:
    """Return the model FLOPs utilization, 0 to 1, of the run's devices; None where a FLOP count or peak is not known.

    Peaks are those of products in 16 bit, so a run in fp32 has none.
    """
    device = run.engine.device
    if device.type != "cuda" or run.plan.precision == "fp32" or run.flops_per_token is None:
        return None
    peak = peak_flops(torch.cuda.get_device_name(device))
    return None if peak is None else run.flops_per_token * tokens_per_s / (peak * dist.get_world_size())


def model_flops_per_token(model: PreTrainedModel, seq_len: int) -> float | None:
    """Return the FLOPs of training a model, also one sharded by ZeRO-3, per token; None of a mixture of experts."""
    config = model.config.get_text_config(decoder=True)
    if has_experts(config):
        return None
    trainable, total = count_parameters(model)
    embedding, head = cast(nn.Parameter, model.get_input_embeddings().weight), model.get_output_embeddings()
    if head is None or head.weight is not embedding:  # it is looked up and not multiplied
        size = full_shape(embedding).numel()
        trains = embedding.requires_grad or isinstance(model.get_input_embeddings(), OwnedLayer)
        trainable, total = trainable - size * trains, total - size
    layers = lowrank_layers(model).values()
    trainable += sum(layer.weight_shape.numel() for layer in layers if layer.gradient_sum is not None)
    return flops_per_token(trainable, total - trainable, config, seq_len)


def begin_peak_memory(device: torch.device) -> None:
    """Begin a new peak on a GPU; a CPU knows only the process's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Return the most bytes that were allocated on a GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _factors(names: list[str]) -> list[str]:
    """Return the factors whose steps show a bad reset: A's, whose gradient is 0 at first, or B's where A is frozen."""
    return [name for name in names if name.endswith("lora_A")] or [name for name in names if name.endswith("lora_B")]


def _max_update_over_lr(run: RunState) -> float:
    engine = run.engine
    names, eps = _factors(engine.shards.names), run.recipe.optim.eps
    return max_update_over_lr(engine.shards, names, eps=eps, device=engine.device)
