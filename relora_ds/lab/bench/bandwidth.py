"""Bytes of an optimizer step on one rank: counted where they are sent, beside what the parameters' sizes explain.

Every variant takes three steps on random tokens; the third is counted (at stage 3 the first ones record the order in
which parameters are used, and gather more). Messages under 1 KiB are flags, norms and losses: they are shown apart.
"""

import argparse
import dataclasses
import itertools
import sys

import torch.distributed as dist

from relora_ds.lab.bench.baselines import FULL, VARIANTS, Spec, build, require, step
from relora_ds.lab.bench.environment import rows_as_markdown
from relora_ds.lab.bench.launch_local import launch_local

CONTROL = 1024  # bytes: smaller messages are control
DEFAULT = (FULL, "PEFT, its default", "PEFT, same modules train", "ours, LoRA alone", "ours, dense")
FORMATS = ("ours, bf16", "ours, int8", "ours, fp8", "ours, nf4", "ours, nf4 double")  # they matter at stage 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="llama_60m", help="the network's shape (default: %(default)s)")
    parser.add_argument("--r", type=int, default=128, help="rank of the updates (default: %(default)s)")
    parser.add_argument(
        "--vocab-size", type=int, default=32_000, metavar="N", help="tokens of the vocabulary (default: %(default)s)"
    )
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        default="bf16",
        help="of the run, and of what is sent (default: %(default)s)",
    )
    parser.add_argument(
        "--stages",
        nargs="+",
        type=int,
        choices=range(4),
        default=[0, 1, 2, 3],
        metavar="STAGE",
        help="ZeRO stages (default: 0 1 2 3)",
    )
    parser.add_argument(
        "--accumulation", nargs="+", type=int, default=[1, 4], metavar="N", help="micro-steps in a step (default: 1 4)"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        metavar="NAME",
        help=f"of {', '.join(map(repr, VARIANTS))} (default: those without a storage format, and at stage 3 all)",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=2,
        metavar="N",
        help="processes of this machine, where no launcher started this one (default: %(default)s)",
    )


def run(arguments: argparse.Namespace) -> dict:
    """Count one variant after the other. ValueError: see `require`, or the ranks failed."""
    require(_specs(arguments))
    return launch_local("relora_ds.lab.bench.bandwidth", arguments, arguments.ranks)


def _specs(arguments: argparse.Namespace) -> list[Spec]:
    shared = {name: getattr(arguments, name) for name in ("preset", "r", "vocab_size", "precision")}
    found = []
    for stage, accumulation in itertools.product(arguments.stages, arguments.accumulation):
        for variant in arguments.variants or (*DEFAULT, *(FORMATS if stage == 3 else ())):
            placements = ("sharded", "replicated") if stage == 3 and variant.startswith("ours") else ("auto",)
            found += [
                Spec(
                    variant,
                    micro_batch_size=1,
                    seq_len=16,
                    stage=stage,
                    accumulation=accumulation,
                    placement=placement,
                    **shared,
                )
                for placement in placements
            ]
    return found


def measure(arguments: argparse.Namespace) -> dict:
    """Measure all variants. Collective."""
    rows = []
    for spec in _specs(arguments):
        rows.append(
            {
                "variant": spec.variant,
                "stage": spec.stage,
                "accumulation": spec.accumulation,
                "placement": spec.placement,
                **count(spec),
            }
        )
        if dist.get_rank() == 0:
            print(
                f"stage {spec.stage}, {spec.accumulation} micro-steps, {spec.variant}, {spec.placement}: "
                f"{rows[-1]['wire'] / 1e6:.3f} MB",
                file=sys.stderr,
                flush=True,
            )
    return {
        "preset": arguments.preset,
        "r": arguments.r,
        "vocab_size": arguments.vocab_size,
        "precision": arguments.precision,
        "world_size": dist.get_world_size(),
        "rows": rows,
    }


def count(spec: Spec) -> dict:
    """Bytes of one variant's third step, by collective, and what explains them. Collective."""
    from relora_ds.zero.teardown import release
    from relora_ds.zero.traffic import count_traffic, expected_collectives, wire_bytes

    engine = build(spec)
    step(engine, spec, 0)
    step(engine, spec, 1)
    with count_traffic() as traffic:
        step(engine, spec, 2)
    n, sizes = dist.get_world_size(), _sizes(engine)
    expected = expected_collectives(
        **dataclasses.asdict(sizes), stage=spec.stage, accumulation=spec.accumulation, world_size=n
    )
    if spec.stage == 3:
        expected["all_gather"] -= sizes.in_small_messages(n)
    for collective, size in _of_owners(engine).items():
        expected[collective] = expected.get(collective, 0) + size
    if engine.switching is not None:
        expected["all_reduce"] = expected.get("all_reduce", 0) + engine.switching.last_exchange
    counted = traffic.by_collective(at_least=CONTROL)
    release(engine)
    return {
        "counted": counted,
        "expected": expected,
        "payload": sum(counted.values()),
        "control": traffic.payload - sum(counted.values()),
        "wire": sum(wire_bytes(name, size, n) for name, size in counted.items()),
        "expected_wire": sum(wire_bytes(name, size, n) for name, size in expected.items()),
    }


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """Of an engine's parameters: what `expected_collectives` asks for."""

    groups: list[list[int]]
    frozen: list[tuple[int, int]]
    element_size: int
    kept_whole: int

    def in_small_messages(self, world_size: int) -> int:
        """Return the bytes that ZeRO-3 gathers in messages as small as control: each parameter has one of its own."""
        whole = (size for group in self.groups for size in group if size <= self.kept_whole)
        messages = (-(-size // world_size) * world_size * self.element_size for size in whole)  # in equal parts
        return sum(message for message in messages if message < CONTROL)


def _sizes(engine) -> _Sizes:
    from relora_ds.lowrank.wrap import parameter_groups

    # PEFT keeps an unused copy of each module that it trains whole. ZeRO-3 never gathers it for a forward; the small
    # ones it gathers with all others that it keeps whole.
    parameters = [
        p
        for name, p in engine.module.named_parameters()
        if "original_module" not in name or getattr(p, "ds_persist", False)
    ]
    numel = {id(p): getattr(p, "ds_numel", p.numel()) for p in parameters}
    return _Sizes(
        groups=[[numel[id(p)] for p in group["params"]] for group in parameter_groups(engine.module, weight_decay=0.0)],
        frozen=[(numel[id(p)], p.element_size()) for p in parameters if not p.requires_grad],
        element_size=2 if engine.bfloat16_enabled() else 4,
        kept_whole=max((numel[id(p)] for p in parameters if getattr(p, "ds_persist", False)), default=0),
    )


def _of_owners(engine) -> dict[str, int]:
    """Return what owners get and publish in a step.

    ZeRO-3 gathers the weights first, where they are their own masters and are read, and afterwards what it keeps whole
    once more.
    """
    if engine.owner_steps is None:
        return {}
    layers, sent = engine.frozen.layers.values(), engine.owner_steps.step_bytes()
    if engine.zero_optimization_stage() == 3:
        again = [p for p in engine.module.parameters() if p.ds_persist]
        if engine.owner_steps.reads_weights and not engine.frozen.with_masters:
            again += [layer.weight for layer in layers]
        n = dist.get_world_size()
        sent["all_gather"] = sum(-(-p.ds_numel // n) * n * p.element_size() for p in again)  # in equal parts
    return sent


def markdown(result: dict) -> str:
    """Return the table; ratios are to full rank at the same stage and accumulation."""
    full = {(row["stage"], row["accumulation"]): row["wire"] for row in result["rows"] if row["variant"] == FULL}
    rows = [
        [
            "variant",
            "stage",
            "micro-steps",
            "frozen weights",
            "sent per rank",
            "of full rank",
            "reduced",
            "gathered",
            "unexplained",
        ]
    ]
    for row in result["rows"]:
        base = full.get((row["stage"], row["accumulation"]))
        counted = row["counted"]
        reduced = counted.get("all_reduce", 0) + counted.get("reduce_scatter", 0)
        rows.append(
            [
                row["variant"],
                str(row["stage"]),
                str(row["accumulation"]),
                row["placement"] if row["placement"] != "auto" else "",
                _megabytes(row["wire"]),
                f"{100 * row['wire'] / base:.1f} %" if base else "",
                _megabytes(reduced),
                _megabytes(counted.get("all_gather", 0)),
                f"{row['wire'] - row['expected_wire']:.0f} B",
            ]
        )
    return (
        f"{result['preset']}, vocabulary {result['vocab_size']:,}, r {result['r']}, {result['precision']}, "
        f"{result['world_size']} ranks; of one optimizer step\n\n{rows_as_markdown(rows)}"
    )


def _megabytes(size: float) -> str:
    return f"{size / 1e6:.2f} MB" if size else "–"
