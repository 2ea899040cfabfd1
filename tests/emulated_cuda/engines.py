"""What runs on the emulated ranks: engines, from their building to their release."""

import gc
import time
from unittest import mock

import torch
import torch.distributed as dist

import relora_ds
from relora_ds.config import IslandsConfig, ReLoRAConfig
from relora_ds.exchange.island import Islands
from relora_ds.lowrank import frozen
from relora_ds.lowrank.wrap import wrap
from relora_ds.zero import verify_ranks
from relora_ds.zero.capture import capture
from relora_ds.zero.merging import peak_bytes
from relora_ds.zero.teardown import release
from tests.emulated_cuda.pool import gpu
from tests.islands.servers import SECRET
from tests.parity.cases import ds_settings
from tests.small_models import batch, llama

EVERY = 3  # steps between restarts


def live_bytes() -> int:
    """Bytes on this rank's GPU."""
    gc.collect()
    return torch.cuda.memory_allocated()


def build(
    stage: int,
    *,
    precision="bf16",
    offload=False,
    zero=None,
    layers=2,
    relora=None,
    sizes=None,
    islands=None,
    switching=None,
    matrix_optimizer=None,
    fp16=None,
):
    """An engine on a small LLaMA, whose sizes every format can store. fp16: more of the section."""
    config = ReLoRAConfig(**{**dict(r=4, lora_alpha=8, restart_every=EVERY, restart_warmup_steps=1), **(relora or {})})
    sizes = {"hidden_size": 32, "intermediate_size": 48, **(sizes or {})}
    model = wrap(llama(num_hidden_layers=layers, **sizes), config, seed=0)
    settings = ds_settings(stage, precision, offload, **(zero or {}))
    settings["fp16"].update(fp16 or {})
    engine, *_ = relora_ds.initialize(
        model=model,
        config=settings,
        relora=config,
        lr=1e-2,
        total_steps=12,
        warmup_steps=1,
        precision=precision,
        micro_batch_size=6,
        islands=islands,
        switching=switching,
        matrix_optimizer=matrix_optimizer,
    )
    return engine


def train(engine, steps: range) -> float:
    """Some steps, the restarts that are due among them; returns the last one's loss."""
    for step in steps:
        tokens = batch(step, 12).chunk(2)[dist.get_rank() % 2]
        loss = engine(input_ids=tokens, labels=tokens).loss
        engine.backward(loss)
        engine.step()
    return loss.item()


def live_and_let_go(stage: int, **how) -> dict:
    """All that happens to an engine; returns what is left of it on this rank's GPU, in bytes, and what it did."""
    before = live_bytes()
    result = _live(build(stage, **how))
    left = live_bytes() - before
    # Gloo's two threads may still hold the tensors of the last two collectives, after those have returned.
    for _ in range(20):
        if left > 64:
            time.sleep(0.1)
            left = live_bytes() - before
    return result | {"left": left, "left page-locked": gpu().memory.pinned.used}


def _live(engine) -> dict:
    probe = batch(99, 2).to(engine.device)
    engine.drift_probe = lambda: engine.module(input_ids=probe).logits
    loss = train(engine, range(2 * EVERY + 1))
    locked = gpu().memory.pinned.used / _num_frozen(engine)
    engine.eval()
    with torch.no_grad():
        engine(input_ids=probe)
    merged = engine.collect_merged()
    captured = capture(engine, [0, 1], with_frozen=True)
    on_gpu = [
        name
        for tensors in (merged, captured.trained, captured.frozen)
        for name, tensor in tensors.items()
        if tensor.is_cuda
    ]
    result = {
        "loss": loss,
        "restarts": list(engine.restarts),
        "collected on the GPU": on_gpu,
        "page-locked a weight": locked,
    }
    release(engine)
    return result


def memory_of_a_restart(stage: int, layers: int) -> tuple[int, int]:
    """Bytes on this rank's GPU at the peak of a restart beyond those before it, and how many weights are frozen."""
    with mock.patch.object(frozen, "_LEDGER_SAMPLE", 4):  # thousands would be all of a layer as small as these
        engine = build(stage, layers=layers, relora=dict(r=1, optimizer_reset="none"))
    train(engine, range(1))
    before = live_bytes()
    torch.cuda.reset_peak_memory_stats()
    engine.restart()
    peak = torch.cuda.max_memory_allocated() - before
    weights = _num_frozen(engine)
    release(engine)
    return peak, weights


def memory_of_exchanges(address: str, stage: int, precision: str, outer: str, **relora) -> tuple[list[int], int]:
    """Bytes on this rank's GPU at the peak of each restart of an island beyond those before it, and `peak_bytes`."""
    islands = Islands(IslandsConfig(count=1, address=address, outer_optimizer=outer), secret=SECRET)
    sizes = {"hidden_size": 256, "intermediate_size": 512}
    engine = build(stage, precision=precision, layers=1, relora=relora, sizes=sizes, islands=islands)
    shapes = {name: layer.weight_shape for name, layer in engine.frozen.layers.items()}
    restart, peaks = engine.restart, []

    def measured():
        before = live_bytes()
        torch.cuda.reset_peak_memory_stats()
        restart()
        peaks.append(torch.cuda.max_memory_allocated() - before)

    engine.restart = measured
    with mock.patch.object(verify_ranks, "_CHUNK", 1 << 12):
        train(engine, range(2 * EVERY))
    expected = peak_bytes(shapes, engine.relora.r, stage=stage, world_size=dist.get_world_size())
    islands.close()
    release(engine)
    return peaks, expected


def _num_frozen(engine) -> int:
    return sum(layer.weight_shape.numel() for layer in engine.frozen.layers.values())
