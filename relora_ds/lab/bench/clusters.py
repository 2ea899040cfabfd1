"""Step time on clusters that nobody here has: predicted by `planning.cluster`, not measured.

For every number of GPUs (eight to a host) and every network: full rank against the recipe's method, each at the
fastest of the ZeRO stages, micro-batches and with or without recomputation, of those whose memory fits. The last rows
are single GPUs joined by the internet. A step is one of the low-rank phase: warm start and restarts come on top.
"""

import argparse
import dataclasses
import itertools
import sys
from typing import Literal

from relora_ds.lab.bench.environment import rows_as_markdown
from relora_ds.planning.cluster_options import add_cluster_options

PER_HOST = 8
CHECKPOINTING: tuple[Literal["none", "full"], ...] = ("none", "full")
MICRO_BATCHES = (1, 2, 4)
INTERNET = (0.05, 50_000)  # Gbit/s, microseconds
INTERNET_WORKERS = (2, 8, 64)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--presets",
        nargs="+",
        default=["llama_1b_aligned", "llama_7b"],
        metavar="PRESET",
        help="shapes, with the batch of llama_1b_relora (default: llama_1b_aligned llama_7b)",
    )
    parser.add_argument(
        "--gpus",
        type=int,
        nargs="+",
        default=[8, 64, 512, 4096],
        metavar="N",
        help="numbers of GPUs (default: 8 64 512 4096)",
    )
    add_cluster_options(parser)
    parser.add_argument("--memory", type=float, default=80, metavar="GB", help="of a GPU (default: %(default)s)")


def run(arguments: argparse.Namespace) -> dict:
    """Predict all of them. ValueError: a number of GPUs that makes no whole hosts."""
    if wrong := [n for n in arguments.gpus if n < 1 or (n > PER_HOST and n % PER_HOST)]:
        raise ValueError(f"--gpus: {wrong[0]} are not hosts of {PER_HOST}; give a multiple of {PER_HOST}")
    rows = []
    for preset in arguments.presets:
        print(preset, file=sys.stderr, flush=True)
        rows += _of(preset, arguments)
    assumed = {
        name: getattr(arguments, name) for name in ("network_latency", "inside", "inside_latency", "tflops", "memory")
    }
    return {"assumed": assumed, "rows": rows}


def _of(preset: str, arguments: argparse.Namespace) -> list[dict]:
    from relora_ds.planning.cluster import Cluster, Wire

    methods = [
        _Method("full rank", preset, "method=full"),
        _Method("ReLoRA", preset),
        _Method("ReLoRA, LoRA alone", preset, "relora.trainable_modules=[]"),
    ]
    inside = Wire(arguments.inside * 1e9 / 8, arguments.inside_latency * 1e-6)
    places = []
    for gpus in arguments.gpus:
        hosts = max(1, gpus // PER_HOST)
        for gbits in arguments.network if hosts > 1 else arguments.network[:1]:
            between = Wire(gbits * 1e9 / 8, arguments.network_latency * 1e-6)
            places.append((gbits if hosts > 1 else None, Cluster(hosts, gpus // hosts, inside, between)))
    gbits, microseconds = INTERNET
    places += [
        (gbits, Cluster(workers, 1, inside, Wire(gbits * 1e9 / 8, microseconds * 1e-6))) for workers in INTERNET_WORKERS
    ]
    return [
        {
            "preset": preset,
            "method": method.name,
            "gpus": cluster.world_size,
            "hosts": cluster.nodes,
            "network_gbits": network,
            **method.fastest(cluster, arguments.tflops * 1e12, arguments.memory * 1e9),
        }
        for network, cluster in places
        for method in methods
    ]


class _Method:
    """One variant on one network."""

    def __init__(self, name: str, preset: str, *overrides: str):
        from relora_ds.methods import method_of
        from relora_ds.planning.network import network_of, shapes_of
        from relora_ds.training.preflight import resolve

        self.name = name
        self._resolved = resolve(
            "llama_1b_relora", [f"model.preset={preset}", "precision=bf16", *overrides], 1, to_run=False, cuda_bf16=True
        )
        self._method = method_of(self._resolved.recipe)
        self._config, _ = network_of(self._resolved.recipe)
        self._shapes = shapes_of(self._method, self._config)
        self._activations: dict[tuple, int] = {}  # it takes seconds to count them

    def fastest(self, cluster, device_flops: float, memory: float) -> dict:
        """Return the step at the fastest stage that fits into `memory` bytes with its activations, or why none does."""
        from relora_ds.planning.cluster import predict_step, with_batch_for
        from relora_ds.planning.cost import activations_of, cost
        from relora_ds.planning.device_memory import peak

        found = []
        for checkpointing, micro_batch_size in itertools.product(CHECKPOINTING, MICRO_BATCHES):
            train = dataclasses.replace(self._resolved.recipe.train, micro_batch_size=micro_batch_size)
            recipe = dataclasses.replace(self._resolved.recipe, train=train, activation_checkpointing=checkpointing)
            recipe = with_batch_for(recipe, cluster.world_size)
            resolved = dataclasses.replace(self._resolved, recipe=recipe)
            known = recipe.train.micro_batch_size, checkpointing
            if known not in self._activations:
                activations = activations_of(resolved, self._method, self._config)
                assert activations is not None  # presets are networks that can be traced
                self._activations[known] = activations
            for stage in range(4):
                items = cost(
                    resolved,
                    self._method,
                    self._config,
                    stage=stage,
                    world_size=cluster.world_size,
                    shapes=self._shapes,
                ).items
                if peak(items, self._activations[known]) <= memory:
                    step = predict_step(
                        resolved,
                        self._method,
                        self._config,
                        cluster,
                        stage=stage,
                        shapes=self._shapes,
                        device_flops=device_flops,
                    )
                    found.append((step.seconds, checkpointing != "none", stage, -micro_batch_size, step))
        if not found:
            return {"error": "does not fit"}
        _, is_recomputed, _, _, step = min(found, key=lambda one: one[:4])
        return {"recomputed": is_recomputed, **vars(step)}


def markdown(result: dict) -> str:
    """Return the table; speeds are over full rank on the same cluster."""
    rows = [
        [
            "network",
            "GPUs",
            "between hosts",
            "batch",
            "method",
            "stage",
            "recomputed",
            "compute",
            "network time",
            "step",
            "tokens/s",
            "speed",
        ]
    ]
    full = {_place(row): row for row in result["rows"] if row["method"] == "full rank"}
    for row in result["rows"]:
        named = [row["preset"], f"{row['gpus']:,}", f"{row['network_gbits']:g} Gbit/s" if row["network_gbits"] else "-"]
        if "error" in row:
            rows.append([*named, "", row["method"], row["error"], *[""] * 6])
            continue
        base = full[_place(row)].get("seconds")
        rows.append(
            [
                *named,
                f"{row['batch_sequences']:,}",
                row["method"],
                str(row["stage"]),
                "yes" if row["recomputed"] else "no",
                f"{row['compute']:.3g} s",
                f"{row['communication']:.3g} s",
                f"{row['seconds']:.3g} s",
                f"{row['tokens_per_s']:,.0f}",
                f"{base / row['seconds']:.2f}x" if base else "",
            ]
        )
    assumed = result["assumed"]
    return (
        f"Predicted, not measured. Assumed: GPUs of {assumed['memory']:g} GB that reach {assumed['tflops']:g} "
        f"TFLOP/s while they train, {PER_HOST} to a host; inside a host {assumed['inside']:g} Gbit/s and "
        f"{assumed['inside_latency']:g} us, between hosts {assumed['network_latency']:g} us; across the internet "
        f"one GPU a host, {1000 * INTERNET[0]:g} Mbit/s and {INTERNET[1] / 1000:g} ms. Each method at the fastest "
        f"ZeRO stage and micro-batch that fit, and at the same FLOP/s; warm start and restarts are left out."
        f"\n\n{rows_as_markdown(rows)}"
    )


def _place(row: dict) -> tuple:
    return row["preset"], row["gpus"], row["hosts"], row["network_gbits"]
