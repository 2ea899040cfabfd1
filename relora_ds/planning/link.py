"""How fast the link between the ranks is, and which recipe fits it.

`measure` times the two collectives that training uses, at growing sizes. `predict` is a model of a step as plain as
it can be:

    seconds = tokens of a rank x compute seconds per token  +  wire bytes / bandwidth

Nothing is overlapped, which is how DeepSpeed's stages 0 to 2 behave by default. Compute is measured on one and two of
the recipe's own layers and extrapolated; another r is scaled by its FLOPs. So predictions are good for choosing, not
for promising.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from transformers import PretrainedConfig

from relora_ds.models import flops
from relora_ds.planning.network import Shapes

SMALLEST, LARGEST, GROWTH = 4 * 1024, 256 * 2**20, 8
REPEATS = 20


@dataclasses.dataclass(frozen=True)
class Sample:
    """Median seconds of one collective on `size` payload bytes, and its ring wire bytes per second."""

    collective: str
    size: int
    seconds: float
    wire_per_second: float


@dataclasses.dataclass(frozen=True)
class Link:
    """Attributes: latency: seconds of the smallest all_reduce; bandwidth: wire bytes per second at the largest size."""

    world_size: int
    backend: str
    samples: tuple[Sample, ...]

    @property
    def latency(self) -> float:
        return min((s for s in self.samples if s.collective == "all_reduce"), key=lambda s: s.size).seconds

    @property
    def bandwidth(self) -> float:
        return self._largest("all_reduce")

    def wire_per_second(self, stage: int) -> float:
        """Return bytes per second at the largest size, of the collectives of a ZeRO stage.

        gloo's gathers are slower than its reductions. Stage 0 reduces; an all_reduce sends twice the bytes of the
        gather that follows it at stages 1 and 2; stage 3 scatters and gathers.
        """
        reduces, gathers = self._largest("all_reduce"), self._largest("all_gather")
        both = 3 / (2 / reduces + 1 / gathers)
        return (reduces, both, both, gathers)[stage]

    def _largest(self, collective: str) -> float:
        return max((s for s in self.samples if s.collective == collective), key=lambda s: s.size).wire_per_second


def measure(seconds: float, device: torch.device) -> Link:
    """Measure for at most about `seconds`. Collective; every rank gets the same result, that of the slowest rank."""
    started, samples, size = time.monotonic(), [], SMALLEST

    def left() -> float:
        return -_slowest(time.monotonic() - started - seconds, device)

    while True:
        for name, size_padded, factor, call in _collectives(size, device):
            first = _slowest(_timed(call, device), device)
            # Each gets a sixth of the time that is left. The first call, which opens connections, is not counted.
            repeats = max(1, min(REPEATS, int(left() / 6 / first)))
            median = _slowest(statistics.median(_timed(call, device) for _ in range(repeats)), device)
            samples.append(Sample(name, size_padded, median, size_padded * factor / median))
        size *= GROWTH
        slowest = max(sample.seconds for sample in samples[-2:])
        if size > LARGEST or left() < 2 * 2 * GROWTH * slowest:  # two collectives, each at least twice
            return Link(dist.get_world_size(), dist.get_backend(), tuple(samples))


def _collectives(size: int, device: torch.device) -> list[tuple[str, int, float, Callable]]:
    """`(name, payload bytes, wire bytes per payload byte on a ring, call)` on about `size` bytes."""
    n = dist.get_world_size()
    piece = torch.zeros(-(-size // (4 * n)), dtype=torch.float32, device=device)
    whole = torch.zeros(n * len(piece), dtype=torch.float32, device=device)
    return [
        ("all_reduce", 4 * len(whole), 2 * (n - 1) / n, lambda: dist.all_reduce(whole)),
        ("all_gather", 4 * len(whole), (n - 1) / n, lambda: dist.all_gather_into_tensor(whole, piece)),
    ]


def _timed(call: Callable, device: torch.device) -> float:
    _synchronize(device)
    started = time.perf_counter()
    call()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _slowest(value: float, device: torch.device) -> float:
    """Return the largest over the ranks, so that all of them take the same decisions."""
    shared = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX)
    return shared.item()


def seconds_per_token(
    build: Callable[[PretrainedConfig], torch.nn.Module],
    config: PretrainedConfig,
    device: torch.device,
    *,
    micro_batch_size: int,
    seq_len: int,
    repeats: int = 3,
) -> float:
    """Forward and backward of the whole network, per token of a rank, from one and two of its layers. Collective.

    build: from a configuration to a module on `device`, as the method wants it.
    """
    num_layers = config.num_hidden_layers
    one, two = (
        _seconds_of_layers(build, config, device, layers, micro_batch_size, seq_len, repeats) for layers in (1, 2)
    )
    whole = one + (num_layers - 1) * max(two - one, 0.0)
    return _slowest(whole / (micro_batch_size * seq_len), device)


def _seconds_of_layers(build, config, device, layers: int, micro_batch_size: int, seq_len: int, repeats: int) -> float:
    shallow = type(config).from_dict({**config.to_dict(), "num_hidden_layers": layers})
    model = build(shallow)
    tokens = torch.zeros(micro_batch_size, seq_len, dtype=torch.long, device=device)

    def step():
        model(input_ids=tokens, labels=tokens).loss.backward()

    step()  # kernels are chosen, and memory is allocated
    return statistics.median(_timed(step, device) for _ in range(repeats))


def flops_per_token(shapes: Shapes, config: PretrainedConfig, seq_len: int) -> float:
    """FLOPs of forward and backward; the input embedding is looked up and not multiplied."""
    trainable, frozen = shapes.num_trainable + shapes.num_owned, shapes.num_frozen - shapes.num_owned
    return flops.flops_per_token(trainable - shapes.looked_up[0], frozen - shapes.looked_up[1], config, seq_len)


def forward_flops_per_token(shapes: Shapes, config: PretrainedConfig, seq_len: int) -> float:
    """FLOPs of forward alone: 2 for each element that is multiplied with, and causal attention."""
    attention = 2 * config.num_hidden_layers * config.hidden_size * seq_len
    return 2 * (shapes.num_trainable + shapes.num_frozen - sum(shapes.looked_up)) + attention


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One way to run a recipe, and what is predicted of it.

    Attributes:
        memory: peak bytes on a rank's device.
        compute, communication: seconds of a step.
    """

    stage: int
    r: int | None
    micro_batch_size: int
    memory: int
    compute: float
    communication: float
    tokens_per_s: float


def predict(
    *,
    stage: int,
    r: int | None,
    micro_batch_size: int,
    memory: int,
    wire: float,
    tokens_per_step: int,
    world_size: int,
    seconds_per_token: float,
    bandwidth: float,
) -> Candidate:
    """Return a step's seconds, and tokens per second over all ranks."""
    compute = tokens_per_step / world_size * seconds_per_token
    communication = wire / bandwidth
    return Candidate(
        stage, r, micro_batch_size, memory, compute, communication, tokens_per_step / (compute + communication)
    )


def recommend(candidates: list[Candidate], available: float) -> Candidate | None:
    """Return the one to take, of those whose memory fits into `available` bytes; None where none does.

    The largest r whose step spends no more time on the wire than on computing (a smaller r learns less from each
    restart), or the smallest r where none does; of those the fastest; and between equals (5 %) the lower stage, whose
    traffic is simpler, and the larger micro-batch.
    """
    fitting = [c for c in candidates if c.memory <= available]
    if not fitting:
        return None
    balanced = [c for c in fitting if c.communication <= c.compute]
    ranks = {c.r or 0 for c in balanced}
    r = max(ranks) if ranks else min(c.r or 0 for c in fitting)
    same_r = [c for c in (balanced or fitting) if (c.r or 0) == r]
    fastest = max(c.tokens_per_s for c in same_r)
    return min((c for c in same_r if c.tokens_per_s >= 0.95 * fastest), key=lambda c: (c.stage, -c.micro_batch_size))


def ranks_to_try(r: int) -> list[int]:
    """r and its halves, down to 8."""
    return [r // 2**i for i in range(int(math.log2(r)) + 1) if r // 2**i >= min(8, r)]


def micro_batches_to_try(batch_sequences: int, world_size: int, largest: int = 256) -> list[int]:
    """Powers of two that split the batch over the ranks."""
    per_rank, rest = divmod(batch_sequences, world_size)
    return [] if rest else [2**i for i in range(int(math.log2(largest)) + 1) if per_rank % 2**i == 0]
