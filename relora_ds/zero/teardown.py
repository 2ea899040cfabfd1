"""Free everything that an engine holds, so that the next one can be built in the same process.

`engine.destroy()` frees nothing by itself: two forward hooks on the root module keep the engine alive,
the optimizer's flat buffers hang on it, and ZeRO-3 leaves weights behind in the module, partitioned ones as whole.
"""

import gc

import torch

from relora_ds.lowrank.wrap import owned_layers
from relora_ds.zero import accelerator


class ReleasedEngine(torch.nn.Module):
    """What is left of an engine after `release`: DeepSpeed's own class would run its destructor on the empty shell."""

    def __getattr__(self, name: str):
        raise AttributeError(f"this engine was released (asked for {name!r}); use the one that replaced it")


def release(engine) -> None:
    """Free an engine's flat buffers, moments, masters and module; parameters and buffers are empty afterwards.

    Collect what shall survive first (`engine.collect_merged()`).
    """
    module, optimizer, basic = engine.module, engine.optimizer, engine.basic_optimizer
    engine.destroy()
    for hook in (engine.module_forward_pre_hook, engine.module_forward_post_hook):
        hook.remove()
    if hasattr(optimizer, "parameter_offload"):  # ZeRO-3's hooks on every submodule
        optimizer.parameter_offload.__dict__.clear()
    for parameter in module.parameters():
        # Through these attributes a parameter that somebody still holds would keep its flat partition alive.
        for name in [n for n in vars(parameter) if n.startswith(("ds_", "_hp_", "_z3_")) or n == "_zero_optimizer"]:
            delattr(parameter, name)
    # ZeRO-3's hook classes stay registered for good and hold the module: let them hold nothing, buffers included, as
    # replicated frozen weights are.
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data, tensor.grad = torch.empty(0, dtype=tensor.dtype), None
    for layer in owned_layers(module).values():
        layer.sketch = layer.gradient_sum = None
    engine.shards.__dict__.clear()
    engine.frozen.__dict__.clear()
    basic.state.clear()
    for group in basic.param_groups:
        group["params"] = []
    optimizer.__dict__.clear()
    engine.__dict__.clear()
    engine.__class__ = ReleasedEngine
    del module, optimizer, basic
    gc.collect()
    if accelerator.is_cuda():
        torch.cuda.empty_cache()
