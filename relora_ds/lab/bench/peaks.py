"""What a GPU can do at most, by the name that PyTorch gives it: dense products in bf16, as its data sheet says.

Data sheets quote the sparse figure, which is twice the dense one, for the cards since Ampere; these are the dense ones:

    NVIDIA B200 (HGX), H200 and H200 NVL, H100 SXM, PCIe and NVL, A100, L40S: the data sheet of each
    GeForce RTX 4090: NVIDIA's "Ada GPU Architecture", appendix A, with accumulation in fp32
"""

PEAK_FLOPS = {  # per second; a longer name counts before a shorter one
    "B200": 2250e12,
    "H200": 989e12,
    "H200 NVL": 835e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
OTHER_CARDS = {"D", "Laptop", "MIG"}  # the same name with one of these is slower


def peak_flops(name: str) -> float | None:
    """FLOP/s of the card that PyTorch calls `name`; None for one that is not in the table."""
    words = set(name.replace("-", " ").split())
    found = [card for card in PEAK_FLOPS if set(card.split()) <= words and not words & OTHER_CARDS]
    return PEAK_FLOPS[max(found, key=len)] if found else None
