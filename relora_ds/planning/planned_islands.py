"""The mean step of islands, each on a cluster of its own, beside data parallelism over the wire between them.

    exchange    bytes of an island's update x the islands / bandwidth of its connection + round trips x 2 latencies
    mean step   a step on the island's cluster + an exchange / the steps between two of them

An island sends its update and then receives those of the others, over its own connection; that of the server is taken
to be wide enough. All of it is predicted. Left out is the time for which an island waits for slower ones.
"""

import dataclasses

from transformers import PretrainedConfig

from relora_ds.methods import Method
from relora_ds.planning.cluster import Cluster, Step, Wire, predict_step, with_batch_for
from relora_ds.planning.network import Shapes
from relora_ds.planning.planned_exchange import exchange_bytes
from relora_ds.training.preflight import Resolved

# Questions to the server in an exchange: two to send the update, then for the decision, the checksums and what has been
# decided meanwhile; of each other island for the places of its bytes, and for the bytes.
_QUESTIONS, _OF_EACH = 5, 2


@dataclasses.dataclass(frozen=True)
class IslandStep:
    """The mean step of one of several islands, as predicted.

    Attributes:
        every: steps between two exchanges.
        exchange_bytes: that an island sends, and receives of each other one.
        exchange: seconds of one.
        seconds: of a step, with its part of an exchange.
        share: of them, the exchange's part.
        tokens_per_s: of all islands.
        data_parallel: a step of all islands' batches by one run on all clusters, over the wire between them.
    """

    every: int
    exchange_bytes: int
    exchange: float
    seconds: float
    share: float
    tokens_per_s: float
    data_parallel: Step


def exchange_seconds(size: int, count: int, outside: Wire) -> float:
    """Return the seconds of an exchange. size: of an island's update, in bytes; outside: the island's connection."""
    questions = _QUESTIONS + _OF_EACH * (count - 1)
    return count * size / outside.bandwidth + 2 * questions * outside.latency


def predict_islands(
    resolved: Resolved,
    method: Method,
    config: PretrainedConfig,
    cluster: Cluster,
    step: Step,
    outside: Wire,
    *,
    device_flops: float,
    shapes: Shapes,
) -> IslandStep | None:
    """Return the mean step of the recipe's islands; None where `method` has no steps to exchange at.

    Args:
        cluster: of each island.
        step: what `predict_step` says of it there.
        outside: an island's connection to the others.
    """
    islands, relora = resolved.recipe.islands, method.relora
    every = (relora.restart_every if relora is not None else None) or islands.sync_every
    if islands.count is None or every is None:
        return None
    size = exchange_bytes(shapes, relora, islands)
    exchange = exchange_seconds(size, islands.count, outside)
    seconds = step.seconds + exchange / every
    recipe = with_batch_for(resolved.recipe, cluster.world_size)
    train = dataclasses.replace(recipe.train, batch_sequences=islands.count * step.batch_sequences)
    together = predict_step(
        dataclasses.replace(resolved, recipe=dataclasses.replace(recipe, train=train)),
        method,
        config,
        dataclasses.replace(cluster, sites=islands.count, outside=outside),
        stage=step.stage,
        device_flops=device_flops,
        shapes=shapes,
    )
    tokens = islands.count * step.batch_sequences * recipe.data.seq_len
    return IslandStep(every, size, exchange, seconds, exchange / every / seconds, tokens / seconds, together)
