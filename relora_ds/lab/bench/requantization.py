"""What is left of merged updates in a quantized weight after 20 restarts? With an fp32 master, and as others merge.

    others   each restart dequantizes the weight, adds its update and quantizes the sum, to nearest
    ours     the update is added to an fp32 master, and the stored copy is quantized from that, once

Both get the same W (normal, 0.02) and the same updates: products of random factors of rank r, independent and of equal
size, so that the sum S of all n of them is `size` · ‖W‖, and each about size / √n · ‖W‖. What a training run's updates
are is in its metrics: `relative_update_norms` of every restart. In ReLoRA's run of 400 steps on WikiText-2 they were
0.26, 0.16 and 0.12 (median of the layers), at larger models and smaller learning rates they are smaller.

After every restart, with Q_k what the stored copy stands for and S_k the sum of the updates so far:

    lost      1 - ⟨Q_k - Q_0, S_k⟩ / ‖S_k‖²: how much of the update, along itself, the copy lacks
    distance  ‖Q_k - Q_0 - S_k‖ / ‖S_k‖: the same with what rounding adds in all other directions
    error     ‖Q_k - (W + S_k)‖ / ‖W + S_k‖, of the copy that multiplies

Rounding of a copy is noise that does not add up; a lost update is a step that training has made and that is gone. So a
format whose steps are wide beside S has a `distance` above 1 with a master too, and has lost nothing.
"""

import argparse

import torch
from torch import Tensor

from relora_ds.lab.bench.environment import rows_as_markdown
from relora_ds.lowrank.base_format import ALIGNMENT, Format
from relora_ds.lowrank.formats import format_named
from relora_ds.lowrank.frozen import add_update_

FORMATS = ("bf16", "int8", "fp8", "nf4", "nf4_double")
FIGURES = ("lost", "distance", "error")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sizes",
        type=float,
        nargs="+",
        default=[0.01, 0.03, 0.1, 0.3],
        metavar="X",
        help="the sum of all updates, relative to W (default: 0.01 0.03 0.1 0.3)",
    )
    parser.add_argument("--restarts", type=int, default=20, metavar="N", help="merges (default: %(default)s)")
    parser.add_argument("--hidden", type=int, default=512, metavar="N", help="sides of W (default: %(default)s)")
    parser.add_argument("--r", type=int, default=32, metavar="R", help="rank of an update (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of all values (default: %(default)s)")


def run(arguments: argparse.Namespace) -> dict:
    """Return the three figures of both ways after every restart, for every format and size; fractions, not per cent."""
    formats = [format_named(name) for name in FORMATS]
    if reasons := [
        f"bench requantization: {format.name} {reason}" for format in formats if (reason := format.unavailable())
    ]:
        raise ValueError("\n".join(reasons))
    if arguments.hidden % ALIGNMENT:
        raise ValueError(f"--hidden: {arguments.hidden} is no multiple of {ALIGNMENT}, as formats ask for")
    series = []
    for size in arguments.sizes:
        weight, factors = _weight_and_factors(arguments, size)
        for format in formats:
            others, ours = _others(format, weight, factors), _ours(format, weight, factors)
            series.append({"format": format.name, "size": size, "others": others, "ours": ours})
    return {
        "hidden": arguments.hidden,
        "r": arguments.r,
        "restarts": arguments.restarts,
        "seed": arguments.seed,
        "series": series,
    }


def markdown(result: dict) -> str:
    rows = [
        ["format", "S / W", "lost: others", "ours", "distance: others", "ours", "error: at first", "others", "ours"]
    ]
    for entry in result["series"]:
        others, ours = entry["others"], entry["ours"]
        rows.append(
            [
                entry["format"],
                f"{entry['size']:g}",
                *(_percent(way["lost"][-1]) for way in (others, ours)),
                *(_percent(way["distance"][-1]) for way in (others, ours)),
                *(f"{100 * value:.2f} %" for value in (ours["error"][0], others["error"][-1], ours["error"][-1])),
            ]
        )
    return (
        f"After {result['restarts']} restarts; W {result['hidden']}x{result['hidden']}, updates of rank "
        f"{result['r']}:\n\n{rows_as_markdown(rows)}"
    )


def _weight_and_factors(arguments: argparse.Namespace, size: float) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """W, and (A, B) of every restart."""
    generator = torch.Generator().manual_seed(arguments.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    weight = 0.02 * normal(arguments.hidden, arguments.hidden)
    factors = []
    for _ in range(arguments.restarts):
        lora_A, lora_B = normal(arguments.r, arguments.hidden), normal(arguments.hidden, arguments.r)
        lora_B *= size / arguments.restarts**0.5 * weight.norm() / (lora_B @ lora_A).norm()
        factors.append((lora_A, lora_B))
    return weight, factors


def _others(format: Format, weight: Tensor, factors: list[tuple[Tensor, Tensor]]) -> dict[str, list[float]]:
    copies = [_rounded(format, weight)]
    for lora_A, lora_B in factors:
        copies.append(_rounded(format, add_update_(copies[-1].clone(), lora_A, lora_B, 1.0)))
    return _figures(copies, weight, factors)


def _ours(format: Format, weight: Tensor, factors: list[tuple[Tensor, Tensor]]) -> dict[str, list[float]]:
    master = weight.clone()
    copies = [_rounded(format, master)]
    for lora_A, lora_B in factors:
        copies.append(_rounded(format, add_update_(master, lora_A, lora_B, 1.0)))
    return _figures(copies, weight, factors)


def _rounded(format: Format, value: Tensor) -> Tensor:
    """Return what the stored copy of `value` stands for, fp32."""
    return format.dequantize(format.quantize(value, torch.float32), value.shape, torch.float32)


def _figures(copies: list[Tensor], weight: Tensor, factors: list[tuple[Tensor, Tensor]]) -> dict[str, list[float]]:
    """`error` begins before the first restart."""
    figures: dict[str, list[float]] = {name: [] for name in FIGURES}
    update = torch.zeros_like(weight, dtype=torch.float64)
    figures["error"].append(_relative(copies[0] - weight, weight))
    for copy, (lora_A, lora_B) in zip(copies[1:], factors, strict=True):
        update += lora_B.double() @ lora_A.double()
        arrived = copy.double() - copies[0]
        figures["lost"].append(1 - float((arrived * update).sum() / update.square().sum()))
        figures["distance"].append(_relative(arrived - update, update))
        figures["error"].append(_relative(copy - (weight + update), weight + update))
    return figures


def _relative(difference: Tensor, to: Tensor) -> float:
    return float(difference.norm() / to.norm())


def _percent(value: float) -> str:
    return f"{abs(100 * value):.1f} %" if abs(value) < 0.0005 else f"{100 * value:.1f} %"
