"""Bytes over the slow link of a run: what an island sent and received, and what data parallel would have."""

from collections.abc import Sequence

from relora_ds.config import Recipe, load_recipe, methods_of
from relora_ds.planning.network import network_of, shapes_of
from relora_ds.zero.traffic import expected_step


def link_bytes(result: dict, ranks: Sequence[int]) -> list[int]:
    """Return the bytes in and out of one island; of another run, those of a rank of data parallel.

    Args:
        result: of a finished run, see `runs.result_of`.
        ranks: of data parallel; there is a number for each.
    """
    if result.get("islands"):
        return [result["bytes_exchanged"]]
    return [
        2 * data_parallel_bytes(load_recipe(result["recipe"][0], result["recipe"][1:], check_files=False), count)
        for count in ranks
    ]


def data_parallel_bytes(recipe: Recipe, ranks: int) -> int:
    """Return what a rank sends in all steps of a run at stage 0 in fp32, and receives as well. Without restarts."""
    config, _ = network_of(recipe)
    methods, sent = methods_of(recipe), 0.0
    warm = methods[-1].warm_start_steps
    for method, steps in zip(reversed(methods), (recipe.total_steps - warm, warm), strict=False):
        shapes = shapes_of(method, config)
        _, wire = expected_step(
            0,
            trainable=shapes.num_trainable + shapes.num_owned,  # what owners train is reduced and broadcast: the same
            frozen_bytes=0,
            element_size=4,
            accumulation=1,
            world_size=ranks,
        )
        sent += steps * wire
    return round(sent)
