"""Models that are built whole, also where every other one would be partitioned."""

from collections.abc import Iterator
from contextlib import contextmanager

from deepspeed.runtime.zero.partition_parameters import restore_init_context, shutdown_init_context
from transformers.integrations import deepspeed as integration


@contextmanager
def whole_models() -> Iterator[None]:
    """Leave `deepspeed.zero.Init`, and keep transformers from entering it.

    It does so for every model that it builds as long as there are `TrainingArguments` with ZeRO-3.
    """
    arguments = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    shutdown_init_context()
    try:
        yield
    finally:
        restore_init_context()
        integration._hf_deepspeed_config_weak_ref = arguments
