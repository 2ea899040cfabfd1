"""Step time on a cluster that is not at hand, from sizes, FLOPs and the speeds of its wires. All of it is predicted.

    compute         FLOPs of a rank's tokens / what a device reaches in training
    communication   wire bytes of a rank / bandwidth of the slowest wire on the ring + passes x latency of a pass

Bytes are those of rings. A ring visits all ranks of a host before it visits the next one, so that each host sends a
rank's wire bytes to the next host once: `between` is what a host sends in total. Latency is that of trees, which NCCL
takes where rings would wait too long: a pass has log2(hosts) hops between hosts, and visits a host's devices one after
the other. An all_reduce is two passes, a gather or a scatter one.

At stages 0 to 2 nothing is overlapped, as DeepSpeed runs them by default; at stage 3 all of the communication runs
beside compute, the best that can be hoped for. Every method is taken to reach the same FLOP/s, though products of a
small rank reach less than large ones. Left out are the optimizer's own time, stragglers, data, checkpoints, the warm
start and restarts; of recomputation only `full` costs time.

`bench two-hosts` holds it against measured steps.
"""

import dataclasses
import math

from transformers import PretrainedConfig

from relora_ds.config import Recipe
from relora_ds.methods import Method
from relora_ds.planning import device_memory
from relora_ds.planning.cost import cost
from relora_ds.planning.link import flops_per_token, forward_flops_per_token
from relora_ds.planning.network import Shapes, shapes_of
from relora_ds.training.preflight import Resolved


@dataclasses.dataclass(frozen=True)
class Wire:
    """Attributes: bandwidth: bytes per second, in each direction; latency: seconds from one rank to the next."""

    bandwidth: float
    latency: float

    def __post_init__(self):
        if self.bandwidth <= 0 or self.latency < 0:
            raise ValueError(
                f"a wire of {self.bandwidth:g} bytes per second and {self.latency:g} s of latency cannot "
                "be; give a bandwidth above 0"
            )


@dataclasses.dataclass(frozen=True)
class Cluster:
    """`nodes` hosts of `ranks_per_node` devices. `between` is a host's connection, `inside` a device's.

    With `sites` there are so many of these clusters, and `outside` is the connection of each to the others.
    """

    nodes: int
    ranks_per_node: int
    inside: Wire
    between: Wire
    sites: int = 1
    outside: Wire | None = None

    @property
    def world_size(self) -> int:
        return self.sites * self.nodes * self.ranks_per_node

    def communication(self, wire_bytes: float, passes: float) -> float:
        """Seconds of collectives in which every rank sends `wire_bytes`, in so many passes."""
        if self.world_size == 1:
            return 0.0
        wires = ([self.inside] if self.ranks_per_node > 1 else []) + ([self.between] if self.nodes > 1 else [])
        latency = math.ceil(math.log2(self.nodes)) * self.between.latency
        latency += (self.ranks_per_node - 1) * self.inside.latency
        if self.outside is not None and self.sites > 1:
            wires.append(self.outside)
            latency += math.ceil(math.log2(self.sites)) * self.outside.latency
        return wire_bytes / min(wire.bandwidth for wire in wires) + passes * latency


@dataclasses.dataclass(frozen=True)
class Step:
    """One optimizer step as predicted.

    Attributes:
        batch_sequences: over all ranks; the recipe's, or one row a rank where that is more.
        wire_bytes: that each rank sends.
        compute, communication, seconds: seconds is less than the sum where they overlap.
    """

    stage: int
    world_size: int
    batch_sequences: int
    wire_bytes: float
    compute: float
    communication: float
    seconds: float
    tokens_per_s: float


def parse_cluster(text: str) -> tuple[int, int]:
    """`64x8` as (nodes, devices on each). ValueError: it is none."""
    nodes, _, devices = text.lower().partition("x")
    if not (nodes.isdigit() and devices.isdigit() and int(nodes) and int(devices)):
        raise ValueError(f"{text!r} is no cluster; give hosts x devices on each, e.g. 64x8")
    return int(nodes), int(devices)


def predict_step(
    resolved: Resolved,
    method: Method,
    config: PretrainedConfig,
    cluster: Cluster,
    *,
    stage: int,
    device_flops: float,
    shapes: Shapes | None = None,
) -> Step:
    """One optimizer step of `method` on `cluster`.

    Args:
        device_flops: per second, that a device reaches while it trains; not its data sheet's.
        shapes: those of `method` on `config`, if they are known already.
    """
    if device_flops <= 0:
        raise ValueError(f"a device of {device_flops:g} FLOP/s cannot be; give a number above 0")
    recipe = with_batch_for(resolved.recipe, cluster.world_size)
    resolved = dataclasses.replace(resolved, recipe=recipe)
    shapes = shapes or shapes_of(method, config)
    found = cost(resolved, method, config, stage=stage, world_size=cluster.world_size, shapes=shapes)
    assert found.step is not None and found.accumulation is not None  # the batch is a multiple of the ranks
    zero = device_memory.zero_section(
        recipe,
        device_memory.at_stage(resolved.deepspeed, stage),
        shapes,
        precision=resolved.precision,
        accumulation=found.accumulation,
        world_size=cluster.world_size,
    )
    wire, relora = found.step[1], method.relora
    tokens = recipe.batch_sequences * recipe.data.seq_len
    flops = flops_per_token(shapes, config, recipe.data.seq_len)
    if found.residual is not None and relora is not None and relora.residual_every is not None:
        wire += found.residual[1] / relora.residual_every
        flops += 2 * sum(shape.numel() for shape in shapes.merged.values())  # their gradients
    if recipe.activation_checkpointing == "full":
        flops += forward_flops_per_token(shapes, config, recipe.data.seq_len)
    compute = tokens / cluster.world_size * flops / device_flops
    communication = cluster.communication(wire, passes_of(shapes, zero, found.accumulation))
    seconds = max(compute, communication) if stage == 3 else compute + communication
    return Step(
        stage, cluster.world_size, recipe.batch_sequences, wire, compute, communication, seconds, tokens / seconds
    )


def passes_of(shapes: Shapes, zero: dict, accumulation: int) -> float:
    """Return the passes of one optimizer step: every bucket is a collective.

    At stage 3 a bucket is what is prefetched: an estimate, of forward and backward.
    """
    stage, trainable = zero["stage"], shapes.num_trainable
    of_owners = 2 * len(shapes.owner_state)  # a gradient and a weight of each layer
    if stage == 3:
        gathered = math.ceil((trainable + shapes.num_frozen) / int(zero["stage3_prefetch_bucket_size"]))
        return of_owners + accumulation * (2 * gathered + math.ceil(trainable / zero["reduce_bucket_size"]))
    reduced = 2 * math.ceil(trainable / zero["reduce_bucket_size"])
    if stage == 0:
        return of_owners + reduced
    repeated = reduced * (accumulation if stage == 2 else 1)
    return of_owners + repeated + math.ceil(trainable / zero["allgather_bucket_size"])


def with_batch_for(recipe: Recipe, world_size: int) -> Recipe:
    """Return the recipe with the nearest batch that so many ranks can split into micro-batches of at most its size."""
    rows = max(1, round(recipe.batch_sequences / world_size))  # of each rank
    micro = max(size for size in range(1, min(rows, recipe.train.micro_batch_size) + 1) if rows % size == 0)
    return dataclasses.replace(
        recipe,
        train=dataclasses.replace(
            recipe.train, micro_batch_size=micro, batch_sequences=rows * world_size, batch_tokens=None
        ),
    )
