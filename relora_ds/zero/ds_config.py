"""The DeepSpeed configuration: read it, say what ReLoRA cannot run with, fill in its "auto" values.

"auto" follows the Hugging Face convention: the recipe decides. A value that is given and differs from the recipe's is
an error, never overruled in silence. Pure functions of a dict; DeepSpeed is not imported. Names and defaults are those
of DeepSpeed 0.19.8 (`runtime/config.py`, `runtime/zero/config.py`, `runtime/precision_config.py`).
"""

import copy
import json
from pathlib import Path

from relora_ds.config import DS_CONFIG_DIR, ds_config_names
from relora_ds.config.rules import nearest

AUTO = "auto"
_ABSENT = object()

# Larger buckets bring nothing, and DeepSpeed's default of 5e8 elements allocates 1 GB even for tiny models.
MAX_BUCKET_SIZE = 50_000_000
# DeepSpeed's defaults, in elements.
PREFETCH_BUCKET_SIZE = 50_000_000
PERSISTENCE_THRESHOLD = 100_000
MAX_LIVE_PARAMETERS = 1_000_000_000
MAX_REUSE_DISTANCE = 1_000_000_000

# Top-level keys that are passed on. What of them is refused nevertheless is in _REFUSED.
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
_ZEROPP = "ZeRO++ is not available in this version; remove it"

# {dotted key: (values that are harmless, why not and what instead)}
_REFUSED = {
    "scheduler": ((None,), "the learning rate must follow the restarts; remove it, optim.* and relora.* set it"),
    "torch_autocast.enabled": ((False,), "it hides the precision of what is merged; remove it and set precision"),
    "pipeline": ((None, {}), "pipeline parallelism is not available in this version; remove it"),
    "tensor_parallel": ((None, {}), "autotp is not available in this version; remove it"),
    "sequence_parallel_size": ((1,), "sequence parallelism is not available in this version; remove it"),
    "expert_parallel": ((None, {}), "expert parallelism is not available in this version; remove it"),
    "hybrid_engine.enabled": ((False,), "the hybrid engine is not available in this version; remove it"),
    "data_efficiency.enabled": ((False,), "the recipe's data section makes the batches; remove it"),
    "autotuning.enabled": ((False,), "DeepSpeed's autotuning is not available in this version; remove it"),
    "compile.deepcompile": ((False,), "DeepCompile is not available in this version; remove it"),
    "weight_quantization": ((None, {}), "relora.frozen_dtype says how frozen weights are stored; remove it"),
    "datastates_ckpt": ((None, {}), "checkpoints are written by the recipe's checkpoint section; remove it"),
    "managed_gradient_accumulation": ((True,), "steps must be DeepSpeed's to count; remove it"),
    "gradient_allreduce_op": (("mean",), "the learning rate is set for mean gradients; remove it"),
    "disable_allgather": ((False,), "the ranks would drift apart; remove it"),
    "data_types.param_dtype": ((None,), "it overrules the recipe's precision; remove it and set precision"),
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
    "zero_optimization.zenflow": ((None,), "ZenFlow is not available in this version; remove it"),
    "zero_optimization.elastic_checkpoint": ((False,), "a run resumes from its own checkpoints; remove it"),
    "zero_optimization.round_robin_gradients": ((False,), "it changes which rank owns what; remove it"),
    "zero_optimization.legacy_stage1": ((False,), "its shards cannot be edited at a restart; remove it"),
    "zero_optimization.compute_grad_norm": ((True,), "the guard and the log read the gradient norm; remove it"),
    "zero_optimization.save_muon_momentum_buffer_in_memory": ((False,), "Muon is not available; remove it"),
    "zero_optimization.cpu_offload": ((False, None), 'deprecated; use "offload_optimizer": {"device": "cpu"}'),
    "zero_optimization.cpu_offload_param": ((False, None), 'deprecated; use "offload_param": {"device": "cpu"}'),
    "zero_optimization.cpu_offload_use_pin_memory": ((False, None), 'deprecated; use "pin_memory" in "offload_*"'),
    "zero_optimization.offload_optimizer.super_offload": ((False,), "SuperOffload is not available; remove it"),
    "zero_optimization.offload_optimizer.ratio": ((1, 1.0), "partial offload is not available; remove it"),
}

# Sections that DeepSpeed reads through models that take "auto" for "not given".
_SECTIONS_WITH_AUTO = ("zero_optimization", "bf16", "fp16")
_SECTIONS = {
    "zero_optimization": '{"stage": 1}',
    "bf16": '{"enabled": "auto"}',
    "fp16": '{"enabled": "auto"}',
    "optimizer": '{"type": "AdamW"}',
}
_TOP_LEVEL_AUTOS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
)


def load(config: str | Path | dict) -> dict:
    """The configuration as a dict of its own: from a shipped name (`zero1`), a JSON file, or a dict.

    ValueError when there is no such name or file, or it holds no JSON object (also for a key given twice).
    """
    if isinstance(config, dict):
        return copy.deepcopy(config)
    path = Path(config).expanduser()
    if not path.is_file():
        if str(config) not in ds_config_names():
            raise ValueError(
                f"deepspeed: {config} is neither a file nor a shipped configuration"
                f"{nearest(path.stem, ds_config_names())}; shipped: {', '.join(ds_config_names())}"
            )
        path = DS_CONFIG_DIR / f"{config}.json"
    try:
        settings = json.loads(
            path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant
        )
    except OSError as error:
        raise ValueError(f"deepspeed: {path} cannot be read ({error.strerror}); name a file that can") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"deepspeed: {path} is not valid JSON ({error}); correct the file") from error
    if not isinstance(settings, dict):
        raise ValueError(f"deepspeed: {path} holds a {type(settings).__name__}, not an object; correct the file")
    return settings


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key given twice: {', '.join(sorted(key for key in found if keys.count(key) > 1))}")
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def precision_of(config: dict) -> str | None:
    """The precision that the configuration itself demands: bf16, fp16, fp32, or None where it leaves it open."""
    enabled = {name: _get(config, f"{key}.enabled") for name, key in _precision_sections(config).items()}
    for name, value in enabled.items():
        if value is True:
            return name
    return "fp32" if enabled and all(value is False for value in enabled.values()) else None


def _precision_sections(config: dict) -> dict[str, str]:
    """{precision: its section's key}, of the sections that are there. `bfloat16` is the old name of `bf16`."""
    keys = {"bf16": "bf16" if "bf16" in config else "bfloat16", "fp16": "fp16"}
    return {name: key for name, key in keys.items() if key in config}


def problems(
    config: dict,
    *,
    precision: str | None = None,
    micro_batch_size: int | None = None,
    accumulation: int | None = None,
    max_grad_norm: float | None = None,
    lr: float | None = None,
    betas: tuple[float, float] | None = None,
    eps: float | None = None,
    weight_decay: float | None = None,
    batch_size: int | None = None,
) -> list[str]:
    """Everything in `config` that is not supported, or contradicts the arguments (None = not compared).

    One line each: `deepspeed <key>: <value> <why>; <remedy>`. [] when it can run.
    """
    expected = {
        "train_micro_batch_size_per_gpu": (micro_batch_size, "train.micro_batch_size"),
        "train_batch_size": (batch_size, "the recipe's batch of"),
        "gradient_accumulation_steps": (accumulation, "the recipe's accumulation"),
        "gradient_clipping": (max_grad_norm, "optim.max_grad_norm"),
        "optimizer.params.lr": (lr, "optim.lr"),
        "optimizer.params.betas": (None if betas is None else list(betas), "optim.betas"),
        "optimizer.params.eps": (eps, "optim.eps"),
        "optimizer.params.weight_decay": (weight_decay, "optim.weight_decay"),
    }
    found = [
        *_key_problems(config),
        *_refused(config),
        *_precision_problems(config, precision),
        *_zero_problems(config),
        *_optimizer_problems(config),
        *_conflicts(config, expected),
    ]
    return [f"deepspeed {message}" for message in found]


def _key_problems(config: dict) -> list[str]:
    found = []
    refused_top_level = {key for key in _REFUSED if "." not in key}
    for key, value in config.items():
        if key not in TOP_LEVEL_KEYS and key not in refused_top_level:
            found.append(f"{key}: unknown key{nearest(key, TOP_LEVEL_KEYS)}; remove it")
        elif value == AUTO and key not in _TOP_LEVEL_AUTOS and key not in refused_top_level:
            found.append(f'{key}: "auto", but the recipe has no value for it; give one, or remove it')
        elif key in _SECTIONS and not isinstance(value, dict):
            found.append(f"{key}: {_show(value)} is not an object; use e.g. {_SECTIONS[key]}")
    zero = config.get("zero_optimization")
    for key in zero if isinstance(zero, dict) else ():
        if key not in ZERO_KEYS and f"zero_optimization.{key}" not in _REFUSED:
            found.append(f"zero_optimization.{key}: unknown key{nearest(key, ZERO_KEYS)}; remove it")
    return found


def _refused(config: dict) -> list[str]:
    found = []
    for key, (harmless, why) in _REFUSED.items():
        value = _get(config, key)
        dropped = value == AUTO and key.partition(".")[0] in _SECTIONS_WITH_AUTO
        if value is not _ABSENT and not dropped and value not in harmless:
            found.append(f"{key}: {_show(value)}, but {why}")
    return found


def _precision_problems(config: dict, precision: str | None) -> list[str]:
    found = []
    enabled = {name: _get(config, f"{key}.enabled") for name, key in _precision_sections(config).items()}
    if enabled.get("bf16") is True and enabled.get("fp16") is True:
        found.append('bf16.enabled, fp16.enabled: both true; keep one, or "auto" for the recipe\'s precision')
    for name, value in enabled.items():
        if precision is not None and value not in (AUTO, _ABSENT, precision == name):
            found.append(
                f'{name}.enabled: {_show(value)} contradicts precision {precision}; use "auto", or change precision'
            )
    in_fp16 = precision == "fp16" or (precision is None and enabled.get("fp16") is True)
    if in_fp16 and _get(config, "zero_optimization.stage", 0) == 0:
        found.append(
            "fp16.enabled: true at stage 0, where DeepSpeed 0.19 divides gradients by a loss scale that its "
            "backward did not multiply by; use stage 1"
        )
    if "bf16" in config and "bfloat16" in config:
        found.append("bfloat16: the old name of bf16, which is there too; remove it")
    return found


def _zero_problems(config: dict) -> list[str]:
    found = []
    stage = _get(config, "zero_optimization.stage", 0)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        found.append(f"zero_optimization.stage: {stage!r} is not a stage; use 0, 1, 2 or 3")
        return found
    for key, least in (("offload_optimizer", 1), ("offload_param", 3)):
        device = _get(config, f"zero_optimization.{key}.device", "none")
        if device == "nvme":
            found.append(f"zero_optimization.{key}.device: nvme is not available in this version; use cpu")
        elif device not in ("none", "cpu", AUTO):
            found.append(f"zero_optimization.{key}.device: {device!r} is unknown; use cpu or none")
        elif device == "cpu" and stage < least:
            found.append(
                f"zero_optimization.{key}.device: cpu has no effect at stage {stage}; use "
                f"{'a higher stage' if least == 1 else 'stage 3'}, or remove it"
            )
    return found


def _optimizer_problems(config: dict) -> list[str]:
    optimizer = config.get("optimizer")
    if optimizer is None:
        return []
    kind = _get(config, "optimizer.type")
    if str(kind).lower() not in ("adam", "adamw"):
        return [
            f"optimizer.type: {_show(kind)} is not available; only AdamW is (its states are pruned at a restart); "
            "remove the block, optim.* sets its values"
        ]
    if kind in ("Adam", "adam") and _get(config, "optimizer.params.adam_w_mode", True) is False:
        return ["optimizer.params.adam_w_mode: false is not available (L2 instead of weight decay); remove it"]
    ignored = ("lr", "betas", "eps", "weight_decay", "torch_adam", "adam_w_mode", "fused")
    params = _get(config, "optimizer.params", {})
    if not isinstance(params, dict):
        return [f"optimizer.params: {_show(params)} is not an object; remove it, optim.* sets its values"]
    return [
        f"optimizer.params.{key}: {_show(value)} is not available; remove it"
        for key, value in params.items()
        if key not in ignored and (key, value) not in (("amsgrad", False), ("bias_correction", True))
    ]


def _conflicts(config: dict, expected: dict[str, tuple[object, str]]) -> list[str]:
    found = []
    for key, (wanted, field) in expected.items():
        given = _get(config, key)
        if wanted is not None and given not in (_ABSENT, AUTO, None, wanted):
            found.append(f'{key}: {_show(given)} contradicts {field} {wanted}; use "auto", or make them equal')
    return found


def resolve(
    config: dict,
    *,
    precision: str,
    micro_batch_size: int | None,
    accumulation: int | None,
    world_size: int,
    max_grad_norm: float,
    num_trainable: int,
    cpu: bool = False,
) -> dict:
    """What `deepspeed.initialize` gets: `config` with every "auto", and everything that matters, filled in.

    Args:
        precision: fp32, bf16 or fp16.
        micro_batch_size: sequences per forward and rank; None = the config's, else 1.
        accumulation: micro-steps per optimizer step; None = the config's, also by way of its train_batch_size, else 1.
        world_size: number of ranks.
        max_grad_norm: 0 = no clipping.
        num_trainable: T, elements over all ranks; the buckets are sized to it.
        cpu: the ranks compute on CPUs: no overlapped communication, which needs streams.

    A value in `config` that is not "auto" stays as it is. The `optimizer` block is dropped: the caller passes an
    optimizer. `config` itself is not changed. ValueError when `problems` finds something, or the batch sizes do not
    multiply out.
    """
    found = problems(config, precision=precision)
    if found:
        raise ValueError("\n".join(found))
    settings = copy.deepcopy(config)
    settings.pop("optimizer", None)
    if "bfloat16" in settings:
        settings["bf16"] = settings.pop("bfloat16")
    for name in _SECTIONS_WITH_AUTO:
        settings[name] = without_autos(settings.get(name) or {})
    _fill(settings, "gradient_clipping", float(max_grad_norm))  # DeepSpeed 0.19 clips at 1.0 when it is absent
    _resolve_batch(settings, micro_batch_size, accumulation, world_size)
    for name in ("bf16", "fp16"):
        settings[name]["enabled"] = precision == name
    if precision == "bf16":
        # So that a non-finite step is skipped on all ranks, as in fp16. It is the default since 0.19.
        settings["bf16"].setdefault("check_grad_overflow", True)
    _resolve_zero(settings["zero_optimization"], num_trainable, cpu)
    for key, value in {
        "steps_per_print": 10**12,  # the trainer logs
        "wall_clock_breakdown": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW: no compiled op
        # It waits for the GPU at the beginning and the end of every micro-step, for a line of its own.
        "timers": {"throughput": {"enabled": False}},
    }.items():
        settings.setdefault(key, value)
    return settings


def _resolve_batch(settings: dict, micro_batch_size: int | None, accumulation: int | None, world_size: int) -> None:
    micro = _fill(settings, "train_micro_batch_size_per_gpu", micro_batch_size or 1)
    batch = settings.get("train_batch_size", AUTO)
    if accumulation is None:
        accumulation = 1 if batch == AUTO else max(1, batch // (micro * world_size))
    accumulation = _fill(settings, "gradient_accumulation_steps", accumulation)
    product = micro * accumulation * world_size
    if _fill(settings, "train_batch_size", product) != product:
        raise ValueError(
            f"deepspeed train_batch_size: {batch} is not {product} = micro-batch {micro} × accumulation "
            f'{accumulation} × {world_size} ranks; use "auto"'
        )


def _resolve_zero(zero: dict, num_trainable: int, cpu: bool) -> None:
    stage = zero.setdefault("stage", 0)
    bucket = max(1, min(MAX_BUCKET_SIZE, num_trainable))
    bucket += bucket % 2  # 16-bit buckets start at 4-byte boundaries
    zero.setdefault("reduce_bucket_size", bucket)
    zero.setdefault("allgather_bucket_size", bucket)
    if stage == 3:
        zero.setdefault("stage3_prefetch_bucket_size", PREFETCH_BUCKET_SIZE)
        # Parameters below it stay whole on every rank: norms and biases, also where the model is tiny.
        zero.setdefault("stage3_param_persistence_threshold", min(PERSISTENCE_THRESHOLD, num_trainable // 100))
        zero.setdefault("stage3_max_live_parameters", MAX_LIVE_PARAMETERS)
        zero.setdefault("stage3_max_reuse_distance", MAX_REUSE_DISTANCE)
    if cpu:
        zero.setdefault("overlap_comm", False)


def _fill(settings: dict, key: str, value):
    """Set `key` where it is absent or "auto"; returns what it is then."""
    if settings.get(key, AUTO) in (AUTO, None):
        settings[key] = value
    return settings[key]


def without_autos(section: dict) -> dict:
    """Return a section without the values that DeepSpeed is to choose."""
    return {
        key: without_autos(value) if isinstance(value, dict) else value
        for key, value in section.items()
        if value != AUTO
    }


def _get(config: dict, dotted: str, default=_ABSENT):
    for key in dotted.split("."):
        if not isinstance(config, dict) or key not in config:
            return default
        config = config[key]
    return config


def _show(value) -> str:
    return "nothing" if value is _ABSENT else json.dumps(value, default=str)
