"""How fast is one low-rank layer? Forward and backward in every storage format, against full rank, naive LoRA and PEFT.

Timed is what a layer inside a network computes: its output, the gradient of its input, and those of what it trains
(full rank: W; the others: A and B). The layers are square, hidden x hidden, without bias or dropout.

    full     nn.Linear that trains
    naive    F.linear(x, W) + s · F.linear(F.linear(x, A), B), W frozen
    peft     PEFT's lora.Linear
    dense …  ReLoRALinear in that format; or, with --compare products, dense with one of both products, and with A and
             B or B alone that trains (`lab.bench.layer_products`)

In FLOPs a token costs full rank 6·in·out and a low-rank layer less: W needs no gradient, A and B are small
(`lowrank.folding`). Their quotient is the ceiling of a speed-up over full rank. It is below 1 where r is large beside
hidden.

All layers take turns in every repetition, so that what else a machine does falls on all of them. A speed is the median
over the repetitions of full rank's time / the layer's.
"""

import argparse
import importlib.util
import statistics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from relora_ds.lab.bench import layer_products, layer_timing
from relora_ds.lab.bench.environment import rows_as_markdown
from relora_ds.lowrank import folding
from relora_ds.lowrank.base_format import ALIGNMENT, Format
from relora_ds.lowrank.formats import DENSE, DTYPES, format_of
from relora_ds.lowrank.fp8 import multiplies_fp8
from relora_ds.lowrank.kernels import SLOW_ON_CPU
from relora_ds.lowrank.linear import ReLoRALinear

OTHERS = ("full", "naive", "peft")
FROZEN_DTYPES = ("auto", "fp32", "bf16", "int8", "fp8", "nf4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where to measure",
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=DTYPES,
        default=["fp32", "bf16"],
        metavar="P",
        help="fp32, bf16 or fp16 (default: fp32 bf16)",
    )
    parser.add_argument(
        "--hidden",
        type=int,
        nargs="+",
        default=[512, 1024, 2048],
        metavar="N",
        help="sizes of the layer (default: 512 1024 2048)",
    )
    parser.add_argument("--r", type=int, nargs="+", default=[32, 128], metavar="R", help="ranks (default: 32 128)")
    parser.add_argument("--r-part", type=int, nargs="+", metavar="N", help="ranks hidden / N, instead of --r")
    parser.add_argument(
        "--compare",
        choices=("formats", "products"),
        default="formats",
        help="storage formats of W, or both factors and B alone, each separate and folded (default: %(default)s)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        metavar="N",
        help="tokens in a call (default: 16384 on CUDA; on a CPU 2048, or 256 without 16-bit units)",
    )
    parser.add_argument(
        "--repetitions", type=int, default=9, metavar="N", help="timings of each layer (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> dict:
    """Return times, in milliseconds of one call, and speeds, as quotients of times.

    Raises:
        ValueError: PEFT or CUDA is missing, or a size has no place in every format.
    """
    if any(hidden % ALIGNMENT for hidden in arguments.hidden):
        raise ValueError(f"--hidden: {arguments.hidden} are not all multiples of {ALIGNMENT}, as formats ask for")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: there is no cuda here; use --device cpu")
    if importlib.util.find_spec("peft") is None:
        raise ValueError('bench layer compares with PEFT, which is missing; pip install ".[peft]"')
    device = torch.device(arguments.device)
    measured = []
    for precision in arguments.precision:
        in_fp32 = device.type == "cpu" and DTYPES[precision] in SLOW_ON_CPU
        rows = arguments.rows or (16384 if device.type == "cuda" else 256 if in_fp32 else 2048)
        for hidden in arguments.hidden:
            for r in arguments.r if arguments.r_part is None else [hidden // part for part in arguments.r_part]:
                layers = _layers(hidden, r, precision, device, arguments.compare)
                times = layer_timing.times_in_turns(
                    layers, hidden, rows, DTYPES[precision], device, arguments.repetitions
                )
                measured.append(
                    {
                        "precision": precision,
                        "hidden": hidden,
                        "r": r,
                        "rows": rows,
                        "in_fp32": in_fp32,
                        "ceiling": ceiling(hidden, hidden, r, rows),
                        "ms": {name: statistics.median(values) for name, values in times.items()},
                        **{f"over_{other}": layer_timing.speeds(times, other) for other in OTHERS},
                        **(layer_products.figures(times, hidden, r, rows) if arguments.compare == "products" else {}),
                    }
                )
    return {"device": arguments.device, "repetitions": arguments.repetitions, "measured": measured}


def ceiling(in_features: int, out_features: int, r: int, rows: int) -> float:
    """Full rank's FLOPs / a low-rank layer's whose factors both train, forward and backward."""
    folded = rows >= folding.folds_from(out_features, in_features, trains_A=True)
    flops = folding.flops(out_features, in_features, r, rows, trains_A=True, folded=folded)
    return 6 * rows * in_features * out_features / flops


def markdown(result: dict) -> str:
    blocks = []
    for precision in dict.fromkeys(entry["precision"] for entry in result["measured"]):
        entries = [entry for entry in result["measured"] if entry["precision"] == precision]
        if "ceilings" in entries[0]:
            blocks.append(layer_products.markdown(entries))
            continue
        blocks += [f"Speed over full rank; {precision}, {entries[0]['rows']} tokens:", _table(entries)]
        formats = [name for name in entries[0]["ms"] if name not in OTHERS]
        for other, named in (("naive", "naive LoRA"), ("peft", "PEFT")):
            lowest = {name: min(entry[f"over_{other}"][name] for entry in entries) for name in formats}
            blocks.append(
                f"Lowest speed over {named}: "
                + ", ".join(f"{name} {value:.2f}" for name, value in lowest.items())
                + "."
            )
        if entries[0]["in_fp32"]:
            blocks.append(
                f"This CPU has no units for {precision}. ReLoRALinear multiplies in fp32 there, torch's own "
                "layers do not: that, and not the FLOPs, is what these speeds show."
            )
    return "\n\n".join(blocks)


def _table(entries: list[dict]) -> str:
    formats = [name for name in entries[0]["ms"] if name not in OTHERS]
    rows = [["hidden", "r", "full rank, ms", "ceiling", "naive", "PEFT", *formats, "dense / ceiling"]]
    for entry in entries:
        speed = entry["over_full"]
        rows.append(
            [
                str(entry["hidden"]),
                str(entry["r"]),
                f"{entry['ms']['full']:.2f}",
                f"{entry['ceiling']:.2f}",
                *(f"{speed[name]:.2f}" for name in ("naive", "peft", *formats)),
                f"{100 * speed['dense'] / entry['ceiling']:.0f} %",
            ]
        )
    return rows_as_markdown(rows)


class _Naive(nn.Module):
    """LoRA as three separate matmuls."""

    def __init__(self, layer: ReLoRALinear):
        super().__init__()
        assert isinstance(layer.weight, Tensor)
        self.weight, self.lora_A, self.lora_B, self.scaling = layer.weight, layer.lora_A, layer.lora_B, layer.scaling

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + self.scaling * F.linear(F.linear(x, self.lora_A), self.lora_B)


def _layers(
    hidden: int, r: int, precision: str, device: torch.device, compare: str = "formats"
) -> dict[str, nn.Module]:
    dtype = DTYPES[precision]
    torch.manual_seed(0)
    values = {
        "weight": torch.randn(hidden, hidden) / hidden**0.5,
        "lora_A": torch.randn(r, hidden) / hidden**0.5,
        "lora_B": torch.randn(hidden, r) / r**0.5,
    }

    def full() -> nn.Linear:
        linear = nn.Linear(hidden, hidden, bias=False, dtype=dtype, device=device)
        linear.load_state_dict({"weight": values["weight"]})
        return linear

    def lowrank(format: Format = DENSE, **how) -> ReLoRALinear:
        how |= {"r": r, "lora_alpha": r, "dtype": dtype, "device": device}
        layer = ReLoRALinear(hidden, hidden, nn.Parameter(full().weight), None, **how)
        layer.load_state_dict(values)
        layer.store_weight(format.quantize(values["weight"].to(device), dtype), format, as_buffer=False)
        return layer

    others = {"full": full(), "naive": _Naive(lowrank()), "peft": _peft(full(), r)}
    if compare == "products":
        return others | {name: lowrank(**how) for name, how in layer_products.COMPARED.items()}
    asked = [
        format_of(name, precision, double_quant=double, in_fp8=multiplies_fp8(device))
        for name, double in (*((name, False) for name in FROZEN_DTYPES), ("nf4", True))
    ]
    formats = {format.name: format for format in asked if format.unavailable() is None}
    return others | {name: lowrank(format) for name, format in formats.items()}


def _peft(linear: nn.Linear, r: int) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    model = nn.ModuleDict({"linear": linear})
    inject_adapter_in_model(LoraConfig(r=r, lora_alpha=r, target_modules=["linear"]), model)
    return model["linear"]
