"""FLOPs of a model's training, and of a GPU at most: what model FLOPs utilization (MFU) is made of.

Peaks are dense products in bf16, by the name that PyTorch gives the card. Data sheets quote the sparse figure, which is
twice the dense one, for the cards since Ampere; these are the dense ones:

    NVIDIA B200 (HGX), H200 and H200 NVL, H100 SXM, PCIe and NVL, A100, L40S: the data sheet of each
    GeForce RTX 4090: NVIDIA's "Ada GPU Architecture", appendix A, with accumulation in fp32
"""

from transformers import PretrainedConfig

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
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def peak_flops(name: str) -> float | None:
    """Return the FLOP/s of the card that PyTorch calls `name`; None for one that is not in the table."""
    words = set(name.replace("-", " ").split())
    found = [card for card in PEAK_FLOPS if set(card.split()) <= words and not words & OTHER_CARDS]
    return PEAK_FLOPS[max(found, key=len)] if found else None


def flops_per_token(trainable: int, frozen: int, config: PretrainedConfig, seq_len: int) -> float:
    """Return the FLOPs of forward and backward: 6 an element that trains, 4 a frozen one, and causal attention.

    A frozen weight needs no weight gradient: 2 of 6 are saved. Nothing is counted for repeated forwards.

    Args:
        trainable, frozen: elements that are multiplied with, so without an embedding that is only looked up.
    """
    return 6 * trainable + 4 * frozen + 6 * config.num_hidden_layers * config.hidden_size * seq_len


def has_experts(config: PretrainedConfig) -> bool:
    """Return True for a mixture of experts: a token is multiplied with some of its elements only."""
    return any(getattr(config, name, None) for name in _EXPERTS)
