"""The random numbers that a training forward draws.

They come from seeds of their own, so that a step draws the same after a resume, and the program's generators are as
before when forward returns or raises: samplers, shuffles and augmentation draw as if no forward had drawn.

What decides *which* code runs must be equal on all ranks: with LayerDrop drawn per rank, they would gather and reduce
different layers and wait for each other for good. What decides *values* must differ: with equal dropout masks, the
gradients of the ranks' rows are correlated. Models draw the former on the host (torch's CPU generator or Python's) and
the latter on the device that computes. So the host's generators get one seed for all ranks, and the device's generator
a seed for each. NumPy's generator, from which no causal language model draws, is left to the program.

On a CPU both come from one generator. It is seeded by rank where the model drops values and no layers.
"""

import contextlib
import random
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from relora_ds.lowrank.seeding import keyed_seed
from relora_ds.lowrank.wrap import lowrank_layers


@contextlib.contextmanager
def seeded_forward(key: str, rank: int, device: torch.device, *, differs_on_cpu: bool) -> Iterator[None]:
    """Seed every generator that a forward may draw from, and restore the program's states afterwards.

    Nothing here waits for a GPU: the state of a CUDA generator is kept on the host.

    Args:
        key: what the seeds follow from beside the rank: the run's seed, the step and the micro-step.
        rank: this process's.
        device: the device that computes; if a GPU, the current one.
        differs_on_cpu: seed the CPU's generator by rank where it is the one that computes; see `drops_values_only`.
    """
    on_cpu = device.type == "cpu"
    host, own = keyed_seed(key), keyed_seed(f"{key}/{rank}")
    python = random.getstate()
    with torch.random.fork_rng(devices=[] if on_cpu else [device]):
        try:
            random.seed(host)
            torch.default_generator.manual_seed(own if on_cpu and differs_on_cpu else host)
            if not on_cpu:
                torch.cuda.manual_seed(own)
            yield
        finally:
            random.setstate(python)


def drops_values_only(model: nn.Module) -> bool:
    """Return True if the model has dropout (in a module or by its configuration) and no LayerDrop."""
    config = getattr(model, "config", None)
    configs = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    rates = [
        (name, value)
        for each in configs
        if each is not None
        for name, value in vars(each).items()
        if "drop" in name and isinstance(value, (int, float)) and value > 0
    ]
    if any("layerdrop" in name.replace("_", "") for name, _ in rates):
        return False
    modules = [getattr(module, "p", 0) for module in model.modules() if isinstance(module, _DropoutNd)]
    modules += [layer.lora_dropout for layer in lowrank_layers(model).values()]
    return bool(rates) or any(rate > 0 for rate in modules)
