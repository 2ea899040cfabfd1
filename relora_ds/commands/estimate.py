"""`python -m relora_ds estimate`."""

import argparse
import json

from relora_ds.commands.recipes import (
    add_recipe,
    planned_bf16,
    precision_as_text,
    recipe_of,
    require_ranks,
    rows_as_text,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe(parser)
    parser.add_argument("--world-size", type=int, nargs="+", default=[1, 8, 16], metavar="N",
                        help="numbers of ranks (default: 1 8 16)")
    parser.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3], choices=[0, 1, 2, 3], metavar="S",
                        help="ZeRO stages (default: 0 1 2 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object with every item")


def run(arguments: argparse.Namespace) -> int:
    recipe_name, overrides = recipe_of(arguments)
    require_ranks(*arguments.world_size)
    from relora_ds.training.console import quieten_libraries
    quieten_libraries()
    from relora_ds.planning.network import network_of
    from relora_ds.training.preflight import resolve
    # One rank: a size that does not divide the batch is shown as such, and is no mistake of the recipe.
    resolved = resolve(recipe_name, overrides, 1, to_run=False, cuda_bf16=planned_bf16())
    config, vocabulary = network_of(resolved.recipe)
    methods = _methods(resolved.recipe)
    activations = {name: _activations(resolved, method, config) for name, method in methods.items()}
    entries = [_entry(resolved, name, method, config, stage, world_size, activations[name])
               for stage in arguments.stages for world_size in arguments.world_size
               for name, method in methods.items()]
    if arguments.json:
        print(json.dumps({"recipe": recipe_name, "precision": resolved.precision, "vocabulary": vocabulary,
                          "activation_bytes": activations, "estimates": entries}, indent=2))
    else:
        print("\n".join(_as_text(resolved, list(methods), vocabulary, activations, entries)))
    return 0


def _methods(recipe) -> dict:
    """The recipe's method and, beside it, full rank."""
    from relora_ds.methods import Full, method_of
    return {recipe.method: method_of(recipe), "full": Full(recipe)}


def _activations(resolved, method, config) -> int | None:
    from relora_ds.planning.activations import activation_bytes
    recipe = resolved.recipe
    return activation_bytes(method, config, precision=resolved.precision,
                            micro_batch_size=recipe.train.micro_batch_size, seq_len=recipe.data.seq_len,
                            attn_implementation=recipe.model.attn_implementation)


def _entry(resolved, name: str, method, config, stage: int, world_size: int, activations: int | None) -> dict:
    from relora_ds.planning.cost import cost
    from relora_ds.planning.memory import DEVICE, HOST, KEPT, peak, total
    result = cost(resolved, method, config, stage=stage, world_size=world_size)
    payload, wire = result.step or (None, None)
    restart_payload, restart_wire = result.restart or (None, None)
    return {
        "method": name, "stage": stage, "world_size": world_size, "accumulation": result.accumulation,
        "trainable": result.shapes.num_trainable, "frozen": result.shapes.num_frozen,
        "state_device_bytes": total(result.items, DEVICE, KEPT), "state_host_bytes": total(result.items, HOST, KEPT),
        "peak_device_bytes": None if activations is None else peak(result.items, activations),
        "step_payload_bytes": payload, "step_wire_bytes": wire, "restart_payload_bytes": restart_payload,
        "restart_wire_bytes": restart_wire, "items": [vars(item) for item in result.items]}


def _as_text(resolved, names: list[str], vocabulary: str, activations: dict, entries: list[dict]) -> list[str]:
    from relora_ds.training.console import human_bytes, human_count
    from relora_ds.training.report import model_name
    recipe = resolved.recipe
    counts = {entry["method"]: (entry["trainable"], entry["frozen"]) for entry in entries}
    lines = [f"{model_name(recipe)}, {precision_as_text(resolved)}, micro-batch {recipe.train.micro_batch_size} x "
             f"{recipe.data.seq_len} tokens, batch {recipe.batch_sequences}", vocabulary]
    for name, (trainable, frozen) in counts.items():
        size = activations[name]
        lines.append(f"{name}: T = {human_count(trainable)} of {human_count(trainable + frozen)} parameters; "
                     f"activations {'unknown' if size is None else human_bytes(size)} (estimate)")
    head = ["stage", "ranks"]
    for name in dict.fromkeys(names):
        head += [f"{name}: state", "host", "peak *", "sent/step"]
    rows = [head]
    for i in range(0, len(entries), len(counts)):
        row = [str(entries[i]["stage"]), str(entries[i]["world_size"])]
        for entry in entries[i:i + len(counts)]:
            row += [_bytes(entry[key]) for key in ("state_device_bytes", "state_host_bytes", "peak_device_bytes",
                                                    "step_wire_bytes")]
        rows.append(row)
    lines += ["", *rows_as_text(rows, num_left=2), "",
              "  state: bytes that a rank's device keeps between steps; host: in the host's memory, for each rank",
              "  * with gradients, buffers and activations of the recipe's micro-batch: an estimate",
              "  sent/step: bytes that each rank sends in a ring for one optimizer step"]
    impossible = sorted({entry["world_size"] for entry in entries if entry["accumulation"] is None})
    if impossible:
        lines.append(f"  -: the batch of {recipe.batch_sequences} cannot be split into micro-batches of "
                     f"{recipe.train.micro_batch_size} over {', '.join(map(str, impossible))} ranks")
    return lines


def _bytes(size: float | None) -> str:
    from relora_ds.training.console import human_bytes
    return "-" if size is None else human_bytes(size)
