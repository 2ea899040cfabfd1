"""`python -m relora_ds check`."""

import argparse

from relora_ds.commands.recipes import checked_recipe, planned_bf16, precision_as_text, require_ranks, rows_as_text
from relora_ds.config.command_line import add_recipe

LINKS = (1, 10, 100)  # Gbit/s
MANY_EVENTS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument(
        "--world-size", type=int, metavar="N", help="ranks (default: WORLD_SIZE, else the GPUs of this machine, else 1)"
    )


def run(arguments: argparse.Namespace) -> int:
    recipe_name, overrides = checked_recipe(arguments)
    require_ranks(arguments.world_size)
    from relora_ds.training.terminal import quieten_libraries

    quieten_libraries()
    import os

    import torch

    from relora_ds.config import RecipeError
    from relora_ds.planning.network import network_of
    from relora_ds.training.preflight import resolve

    world_size = arguments.world_size or int(os.environ.get("WORLD_SIZE", 0)) or max(1, torch.cuda.device_count())
    resolved = resolve(recipe_name, overrides, world_size, to_run=False, cuda_bf16=planned_bf16())
    try:
        config, vocabulary = network_of(resolved.recipe)
    except ValueError as error:
        raise RecipeError(str(error).splitlines(), recipe_name) from error
    for lines in (_head(resolved, config, vocabulary), _calendar(resolved.recipe), _phases(resolved, config)):
        print("\n".join(lines))
    return 0


def _head(resolved, config, vocabulary: str) -> list[str]:
    from relora_ds.training.compatibility import model_name
    from relora_ds.training.preflight import machine_problems
    from relora_ds.training.run_directory import early_problems
    from relora_ds.utils.text import human_count

    recipe = resolved.recipe
    ranks = "1 rank" if resolved.world_size == 1 else f"{resolved.world_size} ranks"
    # `check` is also asked beside a run and on another machine; `train` would refuse.
    warnings = resolved.warnings() + early_problems(recipe) + machine_problems(recipe)
    # That nothing is merged is what people overlook; it comes first.
    warnings.sort(key=lambda text: "no restart" not in text)
    return [
        f"{model_name(recipe)} on {recipe.data.label}, method {recipe.method}, {precision_as_text(resolved)}, "
        f"ZeRO stage {resolved.stage}, {ranks}",
        f"batch: {recipe.batch_sequences:,} sequences of {recipe.data.seq_len:,} tokens = micro-batch "
        f"{recipe.train.micro_batch_size} x {ranks} x accumulation {resolved.accumulation}",
        f"run: {recipe.total_steps:,} steps x {recipe.tokens_per_step:,} tokens = "
        f"{human_count(recipe.total_steps * recipe.tokens_per_step)} tokens",
        *_corpus(recipe),
        vocabulary,
        *_product(resolved, config),
        *_fp8(resolved),
        *(f"WARNING: {warning}" for warning in warnings),
        "",
    ]


def _corpus(recipe) -> list[str]:
    """Return how often the run reads its corpus, as far as that is known."""
    from relora_ds.data.mixture import known_extents
    from relora_ds.training.epochs import epochs_lines, short_corpora

    try:
        extents = known_extents(recipe.data, recipe.trust_remote_code)
    except ValueError:  # what `train` would say about it
        extents = None
    if extents is not None and all(extent.sequences for extent in extents):
        return [
            *epochs_lines(recipe, extents),
            *(f"WARNING: {text}" for text in short_corpora(recipe, extents)),
        ]
    tokens, most = recipe.total_steps * recipe.tokens_per_step, recipe.data.max_tokens
    least = f"at least {tokens / most:.2f}; " if most and tokens > most else ""
    return [f"epochs: {least}exactly known after the corpus is tokenized"]


def _product(resolved, config) -> list[str]:
    """Return whether the run's low-rank layers fold their product into W."""
    from relora_ds.methods import method_of
    from relora_ds.planning.planned_product import product_line
    from relora_ds.planning.planned_storage import format_here

    method = method_of(resolved.recipe)
    format = format_here(method.relora, resolved.precision, resolved.stage)
    line = product_line(resolved.recipe, method, config, format, resolved.precision)
    return [] if line is None else [line]


def _fp8(resolved) -> list[str]:
    """Return whether the products of fp8 weights are in fp8, as far as this machine can tell."""
    from relora_ds.lowrank.fp8 import FP8
    from relora_ds.methods import method_of
    from relora_ds.planning.planned_storage import format_here

    format = format_here(method_of(resolved.recipe).relora, resolved.precision, resolved.stage)
    if not isinstance(format, FP8):
        return []
    if format.both_layouts:
        return ["fp8: products are in fp8; W and its transpose are stored, 2 bytes a weight"]
    if resolved.precision != "bf16":
        reason = f"the run's precision is {resolved.precision}, and fp8 products come with bf16"
    elif resolved.stage == 3 and resolved.recipe.relora.frozen_placement != "replicated":
        reason = "ZeRO-3 shards W; with frozen_placement=replicated GPUs from Hopper on multiply in fp8"
    else:
        reason = "no GPU here multiplies in fp8 (from Hopper on they do, and store 2 bytes a weight)"
    return [f"fp8: stored in 1 byte a weight and dequantized for every product: {reason}"]


def _calendar(recipe) -> list[str]:
    from relora_ds.planning import schedule_preview

    columns, happens = schedule_preview.curve(recipe), schedule_preview.events(recipe)
    highest = max(event.lr for event in happens)
    lines = [
        f"learning rate (peak {highest:.3g})",
        *(f"  {line}" for line in schedule_preview.draw(columns)),
        f"  {schedule_preview.marks(recipe)}",
        "  | a phase begins   ^ restart",
        "",
    ]
    rows = [["after step", "phase", "what happens", "learning rate of the next step"]]
    shown = happens if len(happens) <= MANY_EVENTS else [*happens[: MANY_EVENTS - 4], None, *happens[-3:]]
    for event in shown:
        if event is None:
            rows.append(["…", "", f"({len(happens) - MANY_EVENTS + 1} more)", ""])
        else:
            rows.append(
                [
                    f"{event.step:,}",
                    event.phase,
                    event.what,
                    "-" if event.step == recipe.total_steps else f"{event.lr:.4g}",
                ]
            )
    return [*lines, *rows_as_text(rows, num_left=3), ""]


def _phases(resolved, config) -> list[str]:
    """T, memory and bytes: a column for each phase, and full rank beside them."""
    from relora_ds.methods import full_rank
    from relora_ds.planning.cost import activations_of, cost
    from relora_ds.training.phases import phases_of

    recipe, phases = resolved.recipe, phases_of(resolved.recipe)
    methods = {phase.name: phase.method for phase in phases}
    plain = full_rank(recipe)
    if not any(method.name == plain.name for method in methods.values()):
        methods["full rank"] = plain
    costs = {name: cost(resolved, method, config) for name, method in methods.items()}
    activations = {name: activations_of(resolved, method, config) for name, method in methods.items()}
    run = {phase.name: (phase.stop - phase.start, len(phase.restarts)) for phase in phases}
    names = list(methods)
    rows = [
        ["", *names],
        *_sizes(names, costs, run, recipe.tokens_per_step),
        *_memory(names, costs, activations),
        *_traffic(names, costs),
    ]
    notes = [
        "  * traced on a network without storage: an estimate. peak: what is kept, and the largest of backward, "
        "optimizer, update and restart"
    ]
    if "full rank" in names:
        notes.append("  full rank: for comparison, no phase of this run")
    return [*rows_as_text(rows), *notes]


def _sizes(names: list[str], costs: dict, run: dict, tokens_per_step: int) -> list[list[str]]:
    from relora_ds.utils.text import human_count

    shapes = [costs[name].shapes for name in names]
    everything = [s.num_trainable + s.num_frozen for s in shapes]
    trainable = [s.num_trainable + s.num_owned for s in shapes]
    return [
        ["steps", *(f"{run[name][0]:,}" if name in run else "-" for name in names)],
        ["tokens", *(human_count(run[name][0] * tokens_per_step) if name in run else "-" for name in names)],
        ["restarts", *(str(run[name][1]) if name in run else "-" for name in names)],
        ["parameters", *map(human_count, everything)],
        ["trainable (T)", *map(human_count, trainable)],
        ["  of all", *(f"{100 * t / all:.1f} %" for t, all in zip(trainable, everything, strict=True))],
    ]


def _memory(names: list[str], costs: dict, activations: dict) -> list[list[str]]:
    from relora_ds.planning.device_memory import BACKWARD, DEVICE, HOST, KEPT, OPTIMIZER, UPDATE, peak, total
    from relora_ds.planning.host import HOST_MOMENTS, moment_name
    from relora_ds.utils.text import human_bytes

    rows = []
    for where, head in ((DEVICE, "memory of a rank, device"), (HOST, "memory of a rank, host")):
        kinds = dict.fromkeys(
            (item.what, item.when) for name in names for item in costs[name].items if item.where == where
        )
        if not kinds:
            continue
        rows.append(
            [f"{head}, kept between steps", *(human_bytes(total(costs[name].items, where, KEPT)) for name in names)]
        )
        labels = {
            KEPT: "",
            **{when: f" ({moment_name(when)})" for when in (BACKWARD, OPTIMIZER, UPDATE, *HOST_MOMENTS)},
        }
        for what, when in sorted(kinds, key=lambda kind: list(labels).index(kind[1])):
            sizes = [
                sum(i.size for i in costs[name].items if (i.what, i.when, i.where) == (what, when, where))
                for name in names
            ]
            rows.append(
                [
                    f"  {'+ ' if when != KEPT else ''}{what}{labels[when]}",
                    *(human_bytes(size) if size else "-" for size in sizes),
                ]
            )
        if where == DEVICE:
            known = [activations[name] for name in names]
            rows.append(
                ["  + activations (backward) *", *("unknown" if size is None else human_bytes(size) for size in known)]
            )
            rows.append(
                [
                    "  peak *",
                    *(human_bytes(peak(costs[name].items, size or 0)) for name, size in zip(names, known, strict=True)),
                ]
            )
    return rows


def _traffic(names: list[str], costs: dict) -> list[list[str]]:
    from relora_ds.utils.text import human_bytes

    exchanges = [costs[name].exchange for name in names]
    between = [
        ["bytes per exchange, of an island", *("-" if size is None else human_bytes(size) for size in exchanges)]
    ]
    between = between if any(exchanges) else []
    if costs[names[0]].world_size == 1:
        return [["bytes per step", *("none: one rank" for _ in names)], *between]
    steps, restarts = [costs[name].step for name in names], [costs[name].restart for name in names]
    rows = [
        ["bytes per step, payload", *(human_bytes(step[0]) for step in steps)],
        ["  sent by each rank in a ring", *(human_bytes(step[1]) for step in steps)],
        *([f"  seconds at {speed} Gbit/s", *(_seconds(step[1], speed) for step in steps)] for speed in LINKS),
    ]
    if any(restarts):
        rows += [
            ["bytes per restart, payload", *("-" if r is None else human_bytes(r[0]) for r in restarts)],
            ["  sent by each rank in a ring", *("-" if r is None else human_bytes(r[1]) for r in restarts)],
            [f"  seconds at {LINKS[0]} Gbit/s", *("-" if r is None else _seconds(r[1], LINKS[0]) for r in restarts)],
        ]
    residuals = [costs[name].residual for name in names]
    if any(residuals):
        rows += [
            ["bytes per residual update, payload", *("-" if r is None else human_bytes(r[0]) for r in residuals)],
            ["  sent by each rank in a ring", *("-" if r is None else human_bytes(r[1]) for r in residuals)],
        ]
    return rows + between


def _seconds(size: float, gigabits: int) -> str:
    return f"{size * 8 / (gigabits * 1e9):.3g}"
