"""Claims of docs/results/quantization.md, by heading. See `tests/docs/prose.py`."""

import torch

from relora_ds.lowrank.formats import FP8


def formats() -> list[str]:
    shape = torch.Size([1024, 1024])
    return [f"{8 * FP8(both_layouts=True).num_bytes(shape) / shape.numel():.2f} bits in total"]


CLAIMS = {"Formats": formats}
# heading -> a part of a sentence -> why no file of results has its numbers
FROM_ELSEWHERE = {
    "GPUs": {"neither the peaks at 350M and 1.3B (the paper claims 30 % less than full rank at 1.3B)": "the paper's"},
}
