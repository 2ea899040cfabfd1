"""`python -m relora_ds estimate`."""

import argparse
import dataclasses
import itertools
import json

from relora_ds.commands.island_table import add_outside_options, islands_as_text, outside_of
from relora_ds.commands.recipes import checked_recipe, planned_bf16, precision_as_text, require_ranks, rows_as_text
from relora_ds.config.command_line import add_recipe
from relora_ds.planning.cluster_options import add_cluster_options

DOUBLE = "nf4 double_quant"  # relora.frozen_double_quant


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--world-size", type=int, nargs="+", default=[1, 8, 16], metavar="N", help="numbers of ranks (default: 1 8 16)"
    )
    parser.add_argument(
        "--stages",
        type=int,
        nargs="+",
        default=[0, 1, 2, 3],
        choices=[0, 1, 2, 3],
        metavar="S",
        help="ZeRO stages (default: 0 1 2 3)",
    )
    parser.add_argument(
        "--cluster",
        nargs="+",
        default=[],
        metavar="NxM",
        help="N hosts with M GPUs each, e.g. 1x8 8x8: predict step time and tokens/s there",
    )
    add_cluster_options(parser)
    add_outside_options(parser)
    parser.add_argument(
        "--ranks-per-host",
        type=int,
        default=8,
        metavar="N",
        help="at most; for the memory of a host (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object with every item")


def run(arguments: argparse.Namespace) -> int:
    recipe_name, overrides = checked_recipe(arguments)
    require_ranks(*arguments.world_size)
    require_ranks(arguments.ranks_per_host, option="--ranks-per-host")
    from relora_ds.training.terminal import quieten_libraries

    quieten_libraries()
    from relora_ds.planning.cost import activations_of
    from relora_ds.planning.network import network_of
    from relora_ds.training.preflight import resolve

    # One rank: a size that does not divide the batch is shown as such, and is no mistake of the recipe.
    resolved = resolve(recipe_name, overrides, 1, to_run=False, cuda_bf16=planned_bf16())
    config, vocabulary = network_of(resolved.recipe)
    methods = _methods(resolved.recipe)
    activations = {name: activations_of(resolved, method, config) for name, method in methods.items()}
    entries = [
        _entry(resolved, name, method, config, stage, world_size, activations[name], arguments.ranks_per_host)
        for stage in arguments.stages
        for world_size in arguments.world_size
        for name, method in methods.items()
    ]
    count = resolved.recipe.islands.count
    outside, latency = outside_of(arguments, count)
    clusters = _clusters(arguments, resolved, methods, config, outside, latency)
    own = resolved.recipe.method
    frozen = _by_format(resolved, methods[own], config)
    kept = _by_checkpointing(resolved, methods[own], config, activations[own])
    if arguments.json:
        print(
            json.dumps(
                {
                    "recipe": recipe_name,
                    "precision": resolved.precision,
                    "vocabulary": vocabulary,
                    "activation_bytes": activations,
                    "frozen_bytes_by_format": frozen,
                    "activation_bytes_by_checkpointing": kept,
                    "estimates": entries,
                    "clusters": clusters,
                },
                indent=2,
            )
        )
    else:
        print(
            "\n".join(
                _as_text(resolved, list(methods), vocabulary, activations, entries)
                + _host_as_text(own, entries, arguments.ranks_per_host)
                + _choices_as_text(resolved, frozen, kept)
                + _clusters_as_text(arguments, clusters)
                + islands_as_text(clusters, count, latency)
            )
        )
    return 0


def _methods(recipe) -> dict:
    """Return the recipe's method, that of its warm start and, beside them, full rank."""
    from relora_ds.methods import full_rank, methods_of

    return {method.name: method for method in (*reversed(methods_of(recipe)), full_rank(recipe))}


def _by_format(resolved, method, config) -> dict[str, int]:
    """Bytes of the frozen weights, all of them whole, in every format that can store them; {} without any."""
    from relora_ds.config.relora_config import FROZEN_DTYPES
    from relora_ds.lowrank.formats import DTYPES
    from relora_ds.planning.network import shapes_of
    from relora_ds.planning.planned_storage import format_here

    choices = {name: (name, False) for name in FROZEN_DTYPES if name != "auto"} | {DOUBLE: ("nf4", True)}
    shapes, found = shapes_of(method, config).merged.values(), {}
    for name, (frozen_dtype, double) in choices.items():
        relora = dataclasses.replace(resolved.recipe.relora, frozen_dtype=frozen_dtype, frozen_double_quant=double)
        format = format_here(relora, resolved.precision, resolved.stage)
        if shapes and not any(map(format.problem, shapes)):
            found[name] = sum(format.stored_like(shape, DTYPES[resolved.precision], "meta").nbytes for shape in shapes)
    return found


def _by_checkpointing(resolved, method, config, known: int | None) -> dict[str, int | None]:
    """Bytes of the activations in every mode that the network supports. known: those of the recipe's own."""
    from relora_ds.config.schema import ACTIVATION_CHECKPOINTING
    from relora_ds.models import recompute
    from relora_ds.models.build import meta_model
    from relora_ds.planning.activations import prepared_config
    from relora_ds.planning.cost import activations_of

    found, trained = {}, meta_model(prepared_config(method, config))
    for mode in ACTIVATION_CHECKPOINTING:
        recipe = dataclasses.replace(resolved.recipe, activation_checkpointing=mode)
        if mode == resolved.recipe.activation_checkpointing:
            found[mode] = known
        elif not recompute.problems(trained, mode):
            found[mode] = activations_of(dataclasses.replace(resolved, recipe=recipe), method, config)
    return found


def _entry(
    resolved, name: str, method, config, stage: int, world_size: int, activations: int | None, ranks_per_host: int
) -> dict:
    from relora_ds.planning.cost import cost
    from relora_ds.planning.device_memory import DEVICE, HOST, KEPT, peak, total
    from relora_ds.planning.host import HOST_MOMENTS

    result = cost(resolved, method, config, stage=stage, world_size=world_size)
    payload, wire = result.step or (None, None)
    restart_payload, restart_wire = result.restart or (None, None)
    residual_payload, residual_wire = result.residual or (None, None)
    return {
        "method": name,
        "stage": stage,
        "world_size": world_size,
        "accumulation": result.accumulation,
        "trainable": result.shapes.num_trainable + result.shapes.num_owned,
        "frozen": result.shapes.num_frozen - result.shapes.num_owned,
        "state_device_bytes": total(result.items, DEVICE, KEPT),
        "state_host_bytes": total(result.items, HOST, KEPT),
        "peak_device_bytes": None if activations is None else peak(result.items, activations),
        "host_bytes": {
            when: min(world_size, ranks_per_host) * total(result.items, HOST, KEPT, when)
            for when in (KEPT, *HOST_MOMENTS)
        },
        "step_payload_bytes": payload,
        "step_wire_bytes": wire,
        "restart_payload_bytes": restart_payload,
        "restart_wire_bytes": restart_wire,
        "residual_payload_bytes": residual_payload,
        "residual_wire_bytes": residual_wire,
        "exchange_bytes": result.exchange,
        "items": [vars(item) for item in result.items],
    }


def _as_text(resolved, names: list[str], vocabulary: str, activations: dict, entries: list[dict]) -> list[str]:
    from relora_ds.training.compatibility import model_name
    from relora_ds.utils.text import human_bytes, human_count

    recipe = resolved.recipe
    counts = {entry["method"]: (entry["trainable"], entry["frozen"]) for entry in entries}
    lines = [
        f"{model_name(recipe)}, {precision_as_text(resolved)}, micro-batch {recipe.train.micro_batch_size} x "
        f"{recipe.data.seq_len} tokens, batch {recipe.batch_sequences}",
        vocabulary,
    ]
    for name, (trainable, frozen) in counts.items():
        size = activations[name]
        lines.append(
            f"{name}: T = {human_count(trainable)} of {human_count(trainable + frozen)} parameters; "
            f"activations {'unknown' if size is None else human_bytes(size)} (estimate)"
        )
    head = ["stage", "ranks"]
    for name in dict.fromkeys(names):
        head += [f"{name}: state", "host", "peak *", "sent/step"]
    rows = [head]
    for i in range(0, len(entries), len(counts)):
        row = [str(entries[i]["stage"]), str(entries[i]["world_size"])]
        for entry in entries[i : i + len(counts)]:
            row += [
                _bytes(entry[key])
                for key in ("state_device_bytes", "state_host_bytes", "peak_device_bytes", "step_wire_bytes")
            ]
        rows.append(row)
    lines += [
        "",
        *rows_as_text(rows, num_left=2),
        "",
        "  state: bytes that a rank's device keeps between steps; host: in the host's memory, for each rank",
        "  * with gradients, buffers and activations of the recipe's micro-batch: an estimate",
        "  sent/step: bytes that each rank sends in a ring for one optimizer step",
    ]
    impossible = sorted({entry["world_size"] for entry in entries if entry["accumulation"] is None})
    if impossible:
        lines.append(
            f"  -: the batch of {recipe.batch_sequences} cannot be split into micro-batches of "
            f"{recipe.train.micro_batch_size} over {', '.join(map(str, impossible))} ranks"
        )
    return lines


def _host_as_text(name: str, entries: list[dict], ranks_per_host: int) -> list[str]:
    """Return what all ranks of a host hold in its memory, by moment."""
    from relora_ds.planning.host import moment_name

    own = [entry for entry in entries if entry["method"] == name]
    rows = [["stage", "ranks", *map(moment_name, own[0]["host_bytes"])]]
    rows += [
        [str(entry["stage"]), str(entry["world_size"]), *map(_bytes, entry["host_bytes"].values())] for entry in own
    ]
    return [
        "",
        f"{name}: memory of a host, its ranks (at most {ranks_per_host}) together",
        *rows_as_text(rows, num_left=2),
        "",
        "  kept: between steps. build, phase transition, restart, checkpoint: the peak then;",
        "  restart: at worst, while a checkpoint is still being written",
        "  libraries, data and pretrained weights that have to be converted come on top",
    ]


def _choices_as_text(resolved, frozen: dict[str, int], kept: dict[str, int | None]) -> list[str]:
    """Return what the recipe chose and what else it could have."""
    relora = resolved.recipe.relora
    stored = resolved.precision if relora.frozen_dtype == "auto" else relora.frozen_dtype
    chosen = DOUBLE if stored == "nf4" and relora.frozen_double_quant else stored
    lines = []
    for head, sizes, own in (
        ("frozen weights by relora.frozen_dtype, whole", frozen, chosen),
        ("activations by activation_checkpointing, estimated", kept, resolved.recipe.activation_checkpointing),
    ):
        if sizes:
            lines += [
                "",
                head,
                *rows_as_text(
                    [
                        [f"{name} <" if name == own else name for name in sizes],
                        [_bytes(size) for size in sizes.values()],
                    ],
                    num_left=0,
                ),
            ]
    return lines + ["", "  <: the recipe's"]


def _clusters(
    arguments: argparse.Namespace, resolved, methods: dict, config, outside: list[float], latency: float
) -> list[dict]:
    """Return a step of every method at every stage, on every cluster and network.

    outside, latency: Gbit/s of the wires between islands, and their microseconds.
    """
    from relora_ds.planning.cluster import Cluster, Wire, parse_cluster, predict_step
    from relora_ds.planning.network import shapes_of
    from relora_ds.planning.planned_islands import predict_islands

    shapes = {name: shapes_of(method, config) for name, method in methods.items()}
    inside = Wire(arguments.inside * 1e9 / 8, arguments.inside_latency * 1e-6)
    wires = {gbits: Wire(gbits * 1e9 / 8, latency * 1e-6) for gbits in outside}
    flops = arguments.tflops * 1e12
    found = []
    for nodes, devices in map(parse_cluster, arguments.cluster):
        for gbits in arguments.network[:1] if nodes == 1 else arguments.network:
            cluster = Cluster(nodes, devices, inside, Wire(gbits * 1e9 / 8, arguments.network_latency * 1e-6))
            for stage, (name, method) in itertools.product(arguments.stages, methods.items()):
                step = predict_step(
                    resolved, method, config, cluster, stage=stage, device_flops=flops, shapes=shapes[name]
                )
                islands = {
                    number: predict_islands(
                        resolved, method, config, cluster, step, wire, device_flops=flops, shapes=shapes[name]
                    )
                    for number, wire in wires.items()
                }
                found.append(
                    {
                        "method": name,
                        "nodes": nodes,
                        "devices": devices,
                        "network_gbits": gbits if nodes > 1 else None,
                        **vars(step),
                        "islands": [
                            {"outside_gbits": number, **dataclasses.asdict(one)}
                            for number, one in islands.items()
                            if one is not None
                        ],
                    }
                )
    return found


def _clusters_as_text(arguments: argparse.Namespace, clusters: list[dict]) -> list[str]:
    from relora_ds.utils.text import human_count

    if not clusters:
        return []
    names = list(dict.fromkeys(entry["method"] for entry in clusters))
    rows = [["cluster", "network", "stage", "batch"]]
    for name in names:
        rows[0] += [f"{name}: compute", "network", "step", "tokens/s"]
    rows[0] += ["speed"] * (len(names) > 1)
    for i in range(0, len(clusters), len(names)):
        group = clusters[i : i + len(names)]
        first = group[0]
        network = f"{first['network_gbits']:g} Gbit/s" if first["network_gbits"] else "-"
        row = [f"{first['nodes']}x{first['devices']}", network, str(first["stage"]), str(first["batch_sequences"])]
        for entry in group:
            row += [
                f"{entry['compute']:.3g} s",
                f"{entry['communication']:.3g} s",
                f"{entry['seconds']:.3g} s",
                human_count(entry["tokens_per_s"]),
            ]
        rows.append(row + [f"{group[-1]['seconds'] / first['seconds']:.2f}x"] * (len(names) > 1))
    return [
        "",
        "predicted, not measured",
        *rows_as_text(rows, num_left=2),
        "",
        f"  {arguments.tflops:g} TFLOP/s a GPU while it trains; inside a host {arguments.inside:g} Gbit/s and "
        f"{arguments.inside_latency:g} us; between hosts {arguments.network_latency:g} us",
        "  at stages 0 to 2 nothing overlaps, at stage 3 all of the network runs beside compute",
        "  optimizer, data and stragglers are left out",
        "  batch: the recipe's, or the nearest that so many ranks can split",
    ]


def _bytes(size: float | None) -> str:
    from relora_ds.utils.text import human_bytes

    return "-" if size is None else human_bytes(size)
