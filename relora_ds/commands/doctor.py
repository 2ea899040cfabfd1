"""`python -m relora_ds doctor`."""

import argparse
import dataclasses
import json
import os

from relora_ds.commands.recipes import rows_as_text

LAUNCH = (
    "deepspeed --num_gpus 2 --module relora_ds doctor --link   or   "
    "torchrun --nproc_per_node 2 -m relora_ds doctor --link"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--link", action="store_true", help=f"measure the link between the ranks, under a launcher: {LAUNCH}"
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, metavar="S", help="how long --link may measure (default: %(default)s)"
    )
    parser.add_argument("--config", metavar="RECIPE", help="with --link: the recipe to recommend settings for")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of that recipe's keys")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0 where this machine can train, 1 where something essential is broken."""
    if arguments.seconds <= 0:
        raise ValueError(f"--seconds: {arguments.seconds:g} is no time to measure in; use e.g. 60")
    from relora_ds.planning.machine import examine

    found = examine()
    is_first = int(os.environ.get("RANK", 0)) == 0
    result = {
        "facts": [{"section": s, "name": n, "value": v} for s, n, v in found.facts],
        "essential_problems": found.essential,
        "problems": found.others,
        "link": None,
    }
    lines = _machine_as_text(found)
    if arguments.link and not found.essential:
        result["link"], link_lines = _link(arguments)
        is_first = int(os.environ.get("RANK", 0)) == 0  # srun's ranks are numbered when the process group starts
        lines += link_lines
    if is_first:
        print(json.dumps(result, indent=2) if arguments.json else "\n".join(lines), flush=True)
    return 1 if found.essential else 0


def _machine_as_text(found) -> list[str]:
    lines = []
    for section in dict.fromkeys(section for section, _, _ in found.facts):
        rows = [[name, value] for s, name, value in found.facts if s == section]
        lines += [section, *rows_as_text(rows, num_left=2)]
    lines += [
        "",
        *(f"PROBLEM: {problem}" for problem in found.essential),
        *(f"warning: {problem}" for problem in found.others),
    ]
    return [*lines, "this machine cannot train: see above" if found.essential else "this machine can train"]


def _link(arguments: argparse.Namespace) -> tuple[dict, list[str]]:
    """Measure, and recommend. Collective."""
    from relora_ds.training.terminal import quieten_libraries

    quieten_libraries()
    import dataclasses

    import torch.distributed as dist

    from relora_ds.config import recipe_names
    from relora_ds.planning.advice import advise
    from relora_ds.planning.link import measure
    from relora_ds.training.preflight import resolve
    from relora_ds.zero.accelerator import device_of_rank
    from relora_ds.zero.start import init_distributed

    name = arguments.config or ("llama_130m_relora" if "llama_130m_relora" in recipe_names() else "quickstart")
    resolved = resolve(name, arguments.overrides, 1, to_run=False)  # it is the recommendation that splits the batch
    init_distributed()
    try:
        if dist.get_world_size() < 2:
            raise ValueError(f"--link: one rank has nobody to talk to; start at least two, e.g. {LAUNCH}")
        device = device_of_rank()
        link = measure(arguments.seconds, device)
        advice = advise(resolved, link, device)
    finally:
        dist.destroy_process_group()
    return (
        {
            "recipe": name,
            **dataclasses.asdict(link),
            "latency_s": link.latency,
            "bandwidth_wire_bytes_per_s": link.bandwidth,
            "advice": dataclasses.asdict(advice),
        },
        [*_link_as_text(link), *_advice_as_text(name, resolved, link, advice)],
    )


def _link_as_text(link) -> list[str]:
    from relora_ds.utils.text import human_bytes

    rows = [["collective", "payload", "median", "sent per rank, ring"]]
    rows += [
        [s.collective, human_bytes(s.size), f"{1e3 * s.seconds:.3f} ms", f"{human_bytes(s.wire_per_second)}/s"]
        for s in sorted(link.samples, key=lambda s: (s.collective, s.size))
    ]
    return [
        "",
        f"link between {link.world_size} ranks, {link.backend}",
        *rows_as_text(rows),
        f"  latency {1e6 * link.latency:.0f} us; bandwidth {human_bytes(link.bandwidth)}/s "
        f"= {link.bandwidth * 8 / 1e9:.3g} Gbit/s",
        "",
    ]


def _advice_as_text(name: str, resolved, link, advice) -> list[str]:
    from relora_ds.utils.text import human_bytes, human_count

    recipe, best = resolved.recipe, advice.best
    if best is None:
        least = min(candidate.memory for candidate in advice.candidates)
        return [
            f"{name}: it does not fit: at least {human_bytes(least)} of {human_bytes(advice.available)} a rank; "
            "use a smaller model, more ranks, or an offloading configuration"
        ]
    rows = [["predicted", "stage", "r", "micro-batch", "memory", "compute", "wire", "tokens/s"]]
    shown = [("recommended", best)]
    for stage in range(4):
        same = [
            c
            for c in advice.candidates
            if (c.stage, c.r) == (stage, best.r) and c.memory <= advice.available and c is not best
        ]
        shown += [(recipe.method, max(same, key=lambda c: (c.tokens_per_s, c.micro_batch_size)))] if same else []
    full = [c for c in advice.full_rank if c.memory <= advice.available]
    shown += [("full rank", max(full, key=lambda c: (c.tokens_per_s, c.micro_batch_size)))] if full else []
    rows += [
        [
            label,
            str(c.stage),
            "-" if c.r is None else str(c.r),
            str(c.micro_batch_size),
            human_bytes(c.memory),
            f"{c.compute:.3g} s",
            f"{c.communication:.3g} s",
            human_count(c.tokens_per_s),
        ]
        for label, c in shown
    ]
    settings = f"deepspeed=zero{best.stage} train.micro_batch_size={best.micro_batch_size}"
    if best.r is not None and best.r != recipe.relora.r:  # the scaling stays what it is
        relora = recipe.relora
        alpha = relora.lora_alpha * relora.scaling / dataclasses.replace(relora, r=best.r).scaling
        settings += f" relora.r={best.r} relora.lora_alpha={alpha:g}"
    return [
        f"{name}, {resolved.precision}, {link.world_size} ranks: for this link take  {settings}",
        *rows_as_text(rows),
        "",
        f"Predictions, not measurements: seconds = compute + wire bytes / bandwidth, nothing overlapped; compute "
        f"({1e6 * advice.seconds_per_token:.3g} us a token and rank) from one and two layers of this network, at "
        "most 4 sequences at a time, scaled by FLOPs to another r; memory with activations traced, not measured.",
    ]
