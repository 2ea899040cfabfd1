"""Small models and batches that several tests share."""

import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, MixtralConfig, Qwen2Config

from relora_ds.architectures import ReLoRACoLAConfig, ReLoRACRNetConfig

# Odd sizes and three layers: flat partitions need padding, and tensors straddle ranks.
VOCAB, LENGTH = 67, 12
_SIZES = dict(
    vocab_size=VOCAB,
    hidden_size=20,
    intermediate_size=35,
    num_hidden_layers=3,
    num_attention_heads=2,
    max_position_embeddings=32,
    use_cache=False,
)


def llama(seed: int = 0, **changes):
    return _build(LlamaConfig(**{**_SIZES, "num_key_value_heads": 2, **changes}), seed)


def gpt_neox(seed: int = 0, **changes):
    return _build(GPTNeoXConfig(**{**_SIZES, **changes}), seed)


def qwen2(seed: int = 0, **changes):
    """Biased q, k and v; grouped-query attention; embeddings tied to the head."""
    own = dict(num_key_value_heads=1, tie_word_embeddings=True)
    return _build(Qwen2Config(**{**_SIZES, **own, **changes}), seed)


def gpt2(seed: int = 0, **changes):
    """Conv1D, whose weight is `[in, out]`; embeddings tied to the head; no dropout."""
    sizes = dict(
        vocab_size=VOCAB,
        n_embd=20,
        n_inner=35,
        n_layer=3,
        n_head=2,
        n_positions=32,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
    )
    return _build(GPT2Config(**{**sizes, **changes}), seed)


def mixtral(seed: int = 0, **changes):
    """Experts in one parameter `[experts, out, in]` for each of two projections; sizes that grouped products take."""
    own = dict(hidden_size=24, intermediate_size=16, num_hidden_layers=2, num_key_value_heads=2)
    experts = dict(num_local_experts=3, num_experts_per_tok=2)
    return _build(MixtralConfig(**{**_SIZES, **own, **experts, **changes}), seed)


def cola(seed: int = 0, **changes):
    """LLaMA's sizes, with two factors of rank 4 in place of each linear's weight."""
    return _build(ReLoRACoLAConfig(**{**_SIZES, "num_key_value_heads": 2, "cola_r": 4, **changes}), seed)


def crnet(seed: int = 0, **changes):
    """LLaMA's sizes; the linears of the second layer and the third add a product of rank 4 to the layer before's."""
    return _build(ReLoRACRNetConfig(**{**_SIZES, "num_key_value_heads": 2, "crnet_r": 4, **changes}), seed)


FAMILIES = {"llama": llama, "gpt_neox": gpt_neox, "qwen2": qwen2, "gpt2": gpt2, "mixtral": mixtral}


def _build(config, seed: int):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)


def batch(step: int, size: int, vocab: int = VOCAB, length: int = LENGTH) -> torch.Tensor:
    """Token ids `[size, length]`, a function of the step only."""
    generator = torch.Generator().manual_seed(1000 + step)
    # A skewed distribution, so that there is something to learn.
    return (torch.rand(size, length, generator=generator).square() * vocab).long()
