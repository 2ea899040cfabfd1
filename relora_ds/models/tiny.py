"""Scale a configuration down: the same structure in widths of a few dozen, to check a model by running it.

Widths come from a table. The depth is the smallest at which there is a layer of every kind (sliding and full attention,
attention and state space, dense and experts, layers that share weights): models of growing depth are built on the meta
device until their layers are of all kinds that the full depth has. Families need no rules of their own for this.
"""

import itertools
import re
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from relora_ds.models.build import cannot_build, meta_model

MAX_POSITIONS = 128
VOCAB_SIZE = 256

# The names of attributes in Hugging Face configurations and the size that each gets. The sizes fit each other: 4 heads
# of 16 make a hidden size of 64, 8 state-space heads of 16 twice that (`expand`).
_SIZES = {
    name: size
    for size, names in [
        (
            VOCAB_SIZE,
            "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size "
            "pronunciation_vocab_size shape_vocab_size encoder_hash_byte_group_vocab audio_vocab_size "
            "codebook_size ngram_vocab_size_base",
        ),
        (
            MAX_POSITIONS,
            "max_position_embeddings max_seq_len n_positions n_ctx max_target_positions max_source_positions "
            "context_length",
        ),
        (128, "attention_hidden_size mamba_d_ssm d_inner"),
        (
            96,
            "intermediate_size intermediate_size_mlp ffn_hidden_size ffn_dim d_ff decoder_ffn_dim encoder_ffn_dim dff "
            "dim_ff n_inner feed_forward_size dense_intermediate_size mlp_dim",
        ),
        (
            64,
            "hidden_size n_embd d_model emb_dim embedding_dim hidden_size_global adapter_in_dim adapter_out_dim "
            "adapter_input_size",
        ),
        (
            32,
            "attention_head_dim indexer_head_dim indexer_budget moe_intermediate_size "
            "moe_shared_expert_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
            "shared_intermediate_size expert_ffn_hidden_size",
        ),
        (24, "qk_head_dim"),
        (
            16,
            "d_kv d_head dim_head kv_channels swa_head_dim attention_head_size index_head_dim linear_head_dim "
            "linear_key_head_dim linear_value_head_dim mamba_d_head mamba_head_dim "
            "mamba_headdim qk_nope_head_dim v_head_dim kv_lora_rank q_lora_rank o_lora_rank "
            "hidden_size_per_layer_input chunk_size mamba_chunk_size router_hidden_size",
        ),
        (
            8,
            "num_experts num_local_experts n_routed_experts moe_num_experts qk_rope_head_dim state_size ssm_state_size "
            "mamba_d_state mamba_n_heads mamba_num_heads n_mamba_heads time_step_rank mamba_dt_rank laurel_rank "
            "adapter_rank index_topk rotary_dim zero_expert_num sliding_window sliding_window_size "
            "attention_window_size attention_chunk_size local_attention window_size block_size",
        ),
        (
            4,
            "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads "
            "encoder_attention_heads num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads "
            "linear_num_heads linear_num_value_heads index_n_heads indexer_n_heads num_query_groups",
        ),
        (
            2,
            "num_experts_per_tok num_experts_per_token moe_k moe_topk moe_top_k n_group num_expert_group n_groups "
            "mamba_n_groups mamba_ngroups",
        ),
        (1, "topk_group"),
    ]
    for name in names.split()
}

# Attributes that often equal another one: what they are compared with, and the size that they get where they differ.
_RELATED = {
    "num_key_value_heads": ("num_attention_heads", 2),
    "num_kv_heads": ("num_attention_heads", 2),
    "swa_num_key_value_heads": ("swa_num_attention_heads", 2),
    "kv_n_heads": ("n_heads", 2),
    "linear_num_key_heads": ("linear_num_value_heads", 2),
    **dict.fromkeys(
        ("embedding_size", "input_embedding_size", "output_embedding_size", "word_embed_proj_dim", "lru_width"),
        ("hidden_size", 32),
    ),
}
_DEPTHS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "decoder_layers",
    "encoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
    "num_blocks",
    "depth",
)
# Parts of the depth, which shrink in proportion.
_PARTS_OF_DEPTH = ("num_kv_shared_layers", "n_input_layers", "n_output_layers")


def tiny_config(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of `config` with the same structure and small sizes.

    Every kind of layer stays, and so do the switches, activation functions, ratios, dropouts and tied weights.
    The vocabulary has `VOCAB_SIZE` tokens, and a table of positions `MAX_POSITIONS` rows.

    Args:
        config: the configuration of a causal language model of any family; it is left as it is.

    Raises:
        ValueError: transformers cannot build a model from `config` or from the small copy, or the small copy lacks
            a kind of module that the model has.
    """
    modules = _modules(meta_model(config))
    small = _shortened(config, _full_depth(config.to_dict()))
    if missing := modules - _modules(meta_model(small)):
        raise ValueError(
            f"model: a {config.model_type} model cannot be scaled down without losing {', '.join(sorted(missing))}"
        )
    return small


def _shortened(config: PretrainedConfig, full_depth: int) -> PretrainedConfig:
    """Return `config` in small widths and the smallest depth of two layers or more that holds all kinds of layers."""
    deep = _narrowed(config, full_depth)
    kinds = _kinds_of_layers(deep)
    for depth in range(2, full_depth):
        try:
            small = _narrowed(config, depth)
            if kinds <= _kinds_of_layers(small):
                return small
        except ValueError:  # the family wants a certain pattern of layers
            continue
    return deep


def _full_depth(config: dict[str, Any]) -> int:
    """Return the depth of the deepest part."""
    return max(_depth(config), *(_full_depth(value) for value in config.values() if isinstance(value, dict)), 0)


def _narrowed(config: PretrainedConfig, depth: int) -> PretrainedConfig:
    """Return `config` in small widths, with at most `depth` layers."""
    try:
        return type(config).from_dict(_scaled_down(config.to_dict(), depth))
    except Exception as error:  # whatever the code of a family raises
        raise ValueError(cannot_build(config, error)) from error


def _modules(model: PreTrainedModel) -> set[str]:
    # Identity stands where two widths are equal.
    return {type(module).__name__ for module in model.modules() if not isinstance(module, nn.Identity)}


def _kinds_of_layers(config: PretrainedConfig) -> set[str]:
    """Return what distinguishes layers: modules, their switches, entries of the lists that have one for each layer."""
    kinds = _kinds_in_lists(config.to_dict())
    for path, layers in meta_model(config).named_modules():
        if isinstance(layers, nn.ModuleList):
            seen: set[int] = set()
            for layer in layers:
                weights = {id(weight) for weight in layer.parameters()}
                kinds.add(f"{_without_numbers(path)}: {bool(weights & seen)} {_kind(layer)}")
                seen |= weights
    return kinds


def _kind(layer: nn.Module) -> list[tuple]:
    return sorted(
        {(_without_numbers(name), type(module).__name__, *_switches(module)) for name, module in layer.named_modules()}
    )


def _switches(module: nn.Module) -> list[str]:
    return sorted(
        f"{name}={value}" for name, value in vars(module).items() if value is None or isinstance(value, (bool, str))
    )


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "", name)


def _kinds_in_lists(config: dict[str, Any]) -> set[str]:
    """Return the rows of the lists that have an entry for every layer, or name some layers; sub-configurations too."""
    depth = _depth(config)
    kinds: set[str] = set()
    columns: dict[str, list] = {}
    for name, value in config.items():
        if name == "per_layer_config" and value:
            overrides = {int(index): layer for index, layer in value.items()}
            columns[name] = [overrides.get(i) for i in range(depth)]
        elif isinstance(value, dict):
            kinds |= {f"{name}: {kind}" for kind in _kinds_in_lists(value)}
        elif _are_indices(name, value):
            columns[name] = [i in value for i in range(depth)]
        elif isinstance(value, (list, tuple)) and len(value) == depth:
            columns[name] = list(value)
    return kinds | {str(dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)}


def _are_indices(name: str, values: Any) -> bool:
    """Return True for a list of layer indices, such as full_attn_idxs: [2, 5, 8]."""
    return (
        isinstance(values, (list, tuple))
        and re.search("layer|idx|indices|indexes", name) is not None
        and all(type(value) is int for value in values)
        and all(a < b for a, b in itertools.pairwise(values))
    )


def _depth(config: dict[str, Any]) -> int:
    return next((config[name] for name in _DEPTHS if config.get(name)), 0)


def _scaled_down(config: dict[str, Any], depth: int) -> dict[str, Any]:
    """Return the small configuration, as a dictionary; sub-configurations too."""
    full = _depth(config)
    limit, depth = depth, min(depth, full)
    small = {}
    for name, value in config.items():
        if name in _DEPTHS and value:
            small[name] = min(value, depth)
        elif name in _PARTS_OF_DEPTH and value:
            small[name] = max(1, round(value * depth / full))
        elif name == "n_recurrent_layers":
            small[name] = None  # the rest of the depth
        elif name == "per_layer_config" and value:
            small[name] = {
                index: {key: _scaled(key, entry, {**config, **layer}) for key, entry in layer.items()}
                for index, layer in value.items()
                if int(index) < depth
            }
        elif name in ("short_factor", "long_factor"):  # LongRoPE's, for each rotated pair of channels
            small[name] = value[: int(_SIZES["d_head"] * config.get("partial_rotary_factor", 1.0)) // 2]
        elif isinstance(value, dict):
            small[name] = _scaled_down(value, limit)
        elif _are_indices(name, value):
            small[name] = [index for index in value if index < depth]
        elif isinstance(value, (list, tuple)):
            entries = value[:depth] if len(value) == full else value
            small[name] = [_scaled(name.removesuffix("_per_layer"), entry, config) for entry in entries]
        else:
            small[name] = _scaled(name, value, config)
    return small


def _scaled(name: str, value: Any, config: dict[str, Any]) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 1:
        return value  # one expert group or key-value head, no shared experts: other structures than with two
    if name.endswith(("token_id", "token_index")):
        return min(value, VOCAB_SIZE - 1)
    if name == "head_dim":
        return _scaled_head_dim(value, config)
    if name in _RELATED:
        other, size = _RELATED[name]
        return _SIZES[other] if value == config.get(other) else size
    return _SIZES.get(name, value)


def _scaled_head_dim(head_dim: int, config: dict[str, Any]) -> int:
    """Return the size of a head: with latent attention the rotated part or all; else 32 where heads are wide."""
    if rotated := config.get("qk_rope_head_dim"):
        return _SIZES["qk_rope_head_dim" if head_dim == rotated else "qk_head_dim"]
    heads = config.get("num_attention_heads") or config.get("num_heads") or 1
    return 32 if head_dim * heads > (config.get("hidden_size") or head_dim * heads) else 16
