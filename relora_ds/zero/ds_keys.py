"""The keys of a DeepSpeed configuration: those that are known, and those that ReLoRA cannot run with.

Names are those of DeepSpeed 0.19.8 (`runtime/config.py`, `runtime/zero/config.py`); a test compares them.
"""

import json
from typing import Any

AUTO = "auto"
ABSENT = object()

# Top-level keys that are passed on. What of them is refused nevertheless is in REFUSED.
TOP_LEVEL_KEYS = frozenset(
    {
        "train_batch_size",
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "gradient_clipping",
        "bf16",
        "bfloat16",
        "fp16",
        "zero_optimization",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "optimizer",
        "data_types",
        "checkpoint",
        "communication_data_type",
        "seq_parallel_communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
        "gradient_allreduce_op",
        "managed_gradient_accumulation",
        "disable_allgather",
        "dataloader_drop_last",
        "steps_per_print",
        "wall_clock_breakdown",
        "memory_breakdown",
        "dump_state",
        "log_level",
        "timers",
        "flops_profiler",
        "comms_logger",
        "tensorboard",
        "wandb",
        "csv_monitor",
        "comet",
        "activation_checkpointing",
        "aio",
        "compile",
        "torch_autocast",
        "data_efficiency",
        "hybrid_engine",
        "autotuning",
        "tensor_parallel",
        "sequence_parallel_size",
        "disable_python_gc",
        "vocabulary_size",
    }
)

ZERO_KEYS = frozenset(
    {
        "stage",
        "contiguous_gradients",
        "reduce_scatter",
        "reduce_bucket_size",
        "use_multi_rank_bucket_allreduce",
        "allgather_partitions",
        "allgather_bucket_size",
        "overlap_comm",
        "compute_grad_norm",
        "load_from_fp32_weights",
        "elastic_checkpoint",
        "offload_param",
        "offload_optimizer",
        "zenflow",
        "sub_group_size",
        "cpu_offload_param",
        "cpu_offload_use_pin_memory",
        "cpu_offload",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_model_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
        "stage3_gather_16bit_weights_on_model_save",
        "stage3_module_granularity_threshold",
        "stage3_use_all_reduce_for_fetch_params",
        "stage3_allgather_sequential",
        "stage3_gather_fp16_weights_on_model_save",
        "ignore_unused_parameters",
        "legacy_stage1",
        "round_robin_gradients",
        "parameter_alignment",
        "zero_hpz_partition_size",
        "zero_quantized_weights",
        "zero_quantized_nontrainable_weights",
        "zero_quantized_gradients",
        "memory_efficient_linear",
        "pipeline_loading_checkpoint",
        "override_module_apply",
        "log_trace_cache_warnings",
        "enable_sanity_checks",
        "save_muon_momentum_buffer_in_memory",
        "leaf_module",
    }
)

_GONE = "DeepSpeed 0.19 has removed it; remove it"
_ZEROPP = "ZeRO++ is not supported; remove it"

# {dotted key: (values that are harmless, why not and what instead)}
REFUSED: dict[str, tuple[tuple, str]] = {
    "scheduler": ((None,), "the learning rate must follow the restarts; remove it"),
    "torch_autocast.enabled": ((False,), "it hides the precision of what is merged; remove it and set precision"),
    "pipeline": ((None, {}), "pipeline parallelism is not supported; remove it"),
    "tensor_parallel": ((None, {}), "autotp is not supported; remove it"),
    "sequence_parallel_size": ((1,), "sequence parallelism is not supported; remove it"),
    "expert_parallel": ((None, {}), "expert parallelism is not supported; remove it"),
    "hybrid_engine.enabled": ((False,), "the hybrid engine is not supported; remove it"),
    "data_efficiency.enabled": ((False,), "batches must come as they are given; remove it"),
    "autotuning.enabled": ((False,), "DeepSpeed's autotuning is not supported; remove it"),
    "compile.deepcompile": ((False,), "DeepCompile is not supported; remove it"),
    "weight_quantization": ((None, {}), "frozen_dtype says how frozen weights are stored; remove it"),
    "checkpoint.load_universal": (
        (False,),
        "checkpoints are loaded at any stage and world size; remove it",
    ),
    "datastates_ckpt": ((None, {}), "checkpoints are written in a format of their own; remove it"),
    "managed_gradient_accumulation": ((True,), "steps must be DeepSpeed's to count; remove it"),
    "gradient_allreduce_op": (("mean",), "the learning rate is set for mean gradients; remove it"),
    "disable_allgather": ((False,), "the ranks would drift apart; remove it"),
    "data_types.param_dtype": ((None,), "it overrules the precision of the run; remove it and set precision"),
    "bf16.bf16_master_weights_and_grads": ((False,), "merging needs fp32 masters; remove it"),
    "bf16.bf16_optimizer_states": ((False,), "Adam's states stay fp32; remove it"),
    "fp16.fp16_master_weights_and_grads": ((False,), "merging needs fp32 masters; remove it"),
    "amp": ((), _GONE),
    "elasticity": ((), _GONE),
    "nebula": ((), _GONE),
    "sparse_attention": ((), _GONE),
    "sparse_gradients": ((), _GONE),
    "quantize_training": ((), _GONE),
    "eigenvalue": ((), _GONE),
    "compression_training": ((), _GONE),
    "curriculum_learning": ((), _GONE),
    "graph_harvesting": ((), _GONE),
    "progressive_layer_drop": ((), _GONE),
    "zero_optimization.zero_quantized_weights": ((False,), _ZEROPP),
    "zero_optimization.zero_quantized_gradients": ((False,), _ZEROPP),
    "zero_optimization.zero_quantized_nontrainable_weights": ((False,), _ZEROPP),
    "zero_optimization.zero_hpz_partition_size": ((0, 1), _ZEROPP),
    "zero_optimization.zeropp_loco_param": ((), _GONE),
    "zero_optimization.mics_shard_size": ((), _GONE),
    "zero_optimization.mics_hierarchical_params_gather": ((), _GONE),
    "zero_optimization.zenflow": ((None,), "ZenFlow is not supported; remove it"),
    "zero_optimization.elastic_checkpoint": ((False,), "a run resumes from its own checkpoints; remove it"),
    "zero_optimization.round_robin_gradients": ((False,), "it changes which rank owns what; remove it"),
    "zero_optimization.legacy_stage1": ((False,), "its shards cannot be edited at a restart; remove it"),
    "zero_optimization.compute_grad_norm": ((True,), "the guard and the log read the gradient norm; remove it"),
    "zero_optimization.save_muon_momentum_buffer_in_memory": ((False,), "Muon is not supported; remove it"),
    "zero_optimization.cpu_offload": ((False, None), 'deprecated; use "offload_optimizer": {"device": "cpu"}'),
    "zero_optimization.cpu_offload_param": ((False, None), 'deprecated; use "offload_param": {"device": "cpu"}'),
    "zero_optimization.cpu_offload_use_pin_memory": ((False, None), 'deprecated; use "pin_memory" in "offload_*"'),
    "zero_optimization.offload_optimizer.super_offload": ((False,), "SuperOffload is not supported; remove it"),
    "zero_optimization.offload_optimizer.ratio": ((1, 1.0), "partial offload is not supported; remove it"),
}

# Sections that DeepSpeed reads through models that take "auto" for "not given".
SECTIONS_WITH_AUTO = ("zero_optimization", "bf16", "fp16")
SECTIONS = {
    "zero_optimization": '{"stage": 1}',
    "bf16": '{"enabled": "auto"}',
    "fp16": '{"enabled": "auto"}',
    "optimizer": '{"type": "AdamW"}',
}
TOP_LEVEL_AUTOS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)


def get(config: Any, dotted: str, default: Any = ABSENT) -> Any:
    """Return the value at a dotted key, such as `zero_optimization.stage`."""
    for key in dotted.split("."):
        if not isinstance(config, dict) or key not in config:
            return default
        config = config[key]
    return config


def show(value: object) -> str:
    """Return a value as JSON has it, for messages."""
    return "nothing" if value is ABSENT else json.dumps(value, default=str)
