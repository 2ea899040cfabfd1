"""Networks of relora_ds's own. Each is one file that imports nothing of relora_ds, because it is copied into exports.

Importing the room makes them known to transformers' Auto classes, so that a run's checkpoints and exports are loaded
without running the copies in them.
"""

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from relora_ds.architectures.relora_cola import ReLoRACoLAConfig, ReLoRACoLAForCausalLM
from relora_ds.architectures.relora_crnet import ReLoRACRNetConfig, ReLoRACRNetForCausalLM

NETWORKS = (ReLoRACoLAForCausalLM, ReLoRACRNetForCausalLM)

for _network in NETWORKS:
    AutoConfig.register(_network.config_class.model_type, _network.config_class)
    AutoModelForCausalLM.register(_network.config_class, _network)


def has_code_of_others(model: PreTrainedModel) -> bool:
    """Return True for a model whose code is neither transformers' nor of this room."""
    return model.is_custom_code() and not isinstance(model, NETWORKS)


__all__ = [
    "NETWORKS",
    "ReLoRACRNetConfig",
    "ReLoRACRNetForCausalLM",
    "ReLoRACoLAConfig",
    "ReLoRACoLAForCausalLM",
    "has_code_of_others",
]
