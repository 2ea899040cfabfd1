"""Every causal language model family of transformers: what its default configuration lacks, and what is refused."""

import importlib.util

_QWEN4_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 2048,
    "indexer_compress_ratio": 4,
}

# Families whose default configuration cannot be built, or not run on text: what is to be set.
CHANGES = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"kv_n_heads": 8, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 30}
    },
    "hunyuan_v1_dense": {"head_dim": 128},
    "hunyuan_v1_moe": {"head_dim": 128},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 128},
    "nemotron": {"num_key_value_heads": 8},
    "qwen4_exp": {"text_config": _QWEN4_INDEXER},
    "qwen4_exp_text": _QWEN4_INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
}

# Families whose attention looks at later tokens unless the configuration says that the model is a decoder. The sweep
# expects a refusal without it, and trains with it.
DECODERS_ON_REQUEST = (
    "bert",
    "bert-generation",
    "big_bird",
    "camembert",
    "data2vec-text",
    "electra",
    "ernie",
    "megatron-bert",
    "rembert",
    "roberta",
    "roberta-prelayernorm",
    "roc_bert",
    "roformer",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
)

# What `check` refuses, with the words that say why.
REFUSED = {
    **dict.fromkeys([*DECODERS_ON_REQUEST, "cpmant", "xlm", "xlnet"], "let a token see those after it"),
    **dict.fromkeys(
        [
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "marian",
            "mbart",
            "mvp",
            "pegasus",
            "plbart",
            "trocr",
            "whisper",
        ],
        "do not shift the labels",
    ),
    "gemma4_assistant": "cannot be run on text alone",  # a draft model: it reads the keys and values of another one
    "gemma4_unified_assistant": "cannot be run on text alone",
    "git": "cannot be run on text alone",  # it counts on the logits of an image
    "prophetnet": "cannot be run on text alone",  # its loss shifts labels by a decoder's start token
    "musicgen": "transformers cannot build",  # AutoModelForCausalLM takes the configuration of a part of it
    "musicgen_melody": "transformers cannot build",
}
if importlib.util.find_spec("timm") is None:
    REFUSED["gemma3n"] = "timm"

# Linears that get no low-rank update, by a part of their names: left out with a warning, or by the
# relora.exclude_modules that a refusal names.
LEFT_OUT = {
    # The weight is read without a call, or forward is another than nn.Linear's.
    "jamba": ["dt_proj"],
    **dict.fromkeys(["falcon_mamba", "mamba"], ["dt_proj", "x_proj", "out_proj"]),
    **dict.fromkeys(["bamba", "falcon_h1", "granitemoehybrid", "mamba2", "nemotron_h"], ["out_proj"]),
    "gemma3n_text": ["correction_coefs", "prediction_coefs"],
    **dict.fromkeys(["llama4", "llama4_text", "longcat_flash", "phimoe"], ["router"]),
    # The choice of tokens, experts or patches lets no gradient through.
    **dict.fromkeys(["axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa", "hy_v4"], ["indexer"]),
    "blt": ["patcher"],
    "deepseek_v4": ["compressor", "o_a_proj"],
    "reformer": ["query_key", "value"],
    # One output: no rank fits.
    "hunyuan_v1_moe": ["wg"],
    **dict.fromkeys(["qwen2_moe", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_next"], ["shared_expert_gate"]),
    **dict.fromkeys(["qwen4_exp", "qwen4_exp_text"], ["shared_expert_gate", "indexer"]),
    # Layers share these weights; Zamba2's kernels also read out_proj's.
    "zamba": ["shared_transf"],
    "zamba2": ["shared_transformer", "out_proj"],
    # Text does not reach these.
    "big_bird as decoder": ["pooler"],
    "fuyu": ["vision_embed_tokens"],
    "gemma3": ["vision_tower"],
    "got_ocr2": ["vision_tower", "multi_modal_projector"],
    "mllama": ["cross_attn", "mlp"],  # the cross-attention layers'; exclude_modules names all layers' mlp
    "moss_transcribe_diarize": ["audio_tower", "multi_modal_projector"],
    "phi4_multimodal": ["embed_tokens_extend"],
}
