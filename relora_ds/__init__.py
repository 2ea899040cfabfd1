"""relora_ds: ReLoRA pre-training on DeepSpeed ZeRO. The public names; each is imported when it is first used."""

import importlib

_HOMES = {
    "ReLoRAConfig": "relora_ds.config",
    "SwitchLoRAConfig": "relora_ds.config",
    "wrap": "relora_ds.methods.wrapping",
    "merge_and_unwrap": "relora_ds.lowrank.wrap",
    "lr_multiplier": "relora_ds.lowrank.schedule",
    "initialize": "relora_ds.zero.initialize",
    "Islands": "relora_ds.exchange.island",
    "IslandsConfig": "relora_ds.config",
    "ReLoRAEngine": "relora_ds.zero.engine",
    "load_run": "relora_ds.interop.loaded_run",
    "ReLoRATrainer": "relora_ds.interop.hf_trainer",
    "ReLoRACallback": "relora_ds.interop.hf_trainer",
    "Hook": "relora_ds.training.hooks",
    "Fira": "relora_ds.matrix.fira_update",
    "Apollo": "relora_ds.matrix.apollo_update",
    "Scale": "relora_ds.matrix.scale_update",
    "Muon": "relora_ds.matrix.muon_update",
    "SST": "relora_ds.matrix.sst_update",
}
__version__ = "0.2.0"
__all__ = [*_HOMES, "__version__"]


def __getattr__(name: str):
    # torch and deepspeed take seconds to import; reading a recipe or printing --help needs neither.
    if name not in _HOMES:
        raise AttributeError(f"module 'relora_ds' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
