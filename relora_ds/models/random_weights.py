"""Random weights, drawn one tensor at a time: each from the seed and its name alone.

The distribution is the family's own: transformers' `_init_weights` runs for the modules that give a tensor its value,
on a model in which this tensor alone is real. So any rank can draw any tensor, and holds no more than one.
"""

import logging
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from relora_ds.architectures import has_code_of_others
from relora_ds.models.loading import from_config
from relora_ds.models.traced_init import Call, traced_init
from relora_ds.models.without_values import build_without_values, parameters_on_meta, persistent_buffers, set_value

logger = logging.getLogger(__name__)


class RandomWeights:
    """The random fp32 weights of a seed; a source of weights as an engine takes it.

    Some values cannot be drawn alone: a constructor computes them, or `_init_weights` does from several parameters.
    They are built together on rank 0 when the first of them is read; with the whole model if they depend on others, or
    if the model has code of its own.

    Attributes:
        shapes: of every parameter (tied ones once) and persistent buffer, by name.
        owners: rank 0 for the tensors that cannot be drawn alone; None where there are none.
    """

    def __init__(self, config: PretrainedConfig, seed: int):
        """config: the network's, complete (see `build.build_config`). Every rank traces the initialisation itself."""
        self._config, self._seed = config, seed
        self._calls: dict[str, list[Call]] = {}
        self._keep: set[int] | None = None  # numbers of those that are built together; None: all
        with _random_state(seed):
            try:
                self._model = self._trace()
            except Exception:  # see build_without_values, which says what
                self._model = build_without_values(config, dtype=torch.float32)
        parameters, self._buffers = dict(self._model.named_parameters()), persistent_buffers(self._model)
        self.shapes: Mapping[str, torch.Size] = {
            name: tensor.shape for name, tensor in (*parameters.items(), *self._buffers.items())
        }
        self._together = [name for name in parameters if name not in self._calls]
        self._built: dict[str, Tensor] = {}
        self.owners: Mapping[str, int] | None = dict.fromkeys(self._together, 0) or None
        if self._together:
            logger.info(
                "random weights: %d of %d tensors (first: %s) cannot be drawn one at a time; rank 0 builds %s",
                len(self._together),
                len(parameters),
                self._together[0],
                "the model whole" if self._keep is None else "them together",
            )

    def read(self, name: str) -> Tensor:
        """Draw a tensor. Each can be read once."""
        if name in self._calls:
            return self._drawn(name)
        if name in self._buffers:
            return self._buffers[name].clone()
        if not self._built:
            self._built = self._build_together()
        return self._built.pop(name)

    def _trace(self) -> PreTrainedModel:
        with traced_init() as trace, parameters_on_meta() as registered:
            model = from_config(self._config, dtype=torch.float32)
        if has_code_of_others(model):  # not bound to what transformers' own families keep to
            return model
        parameters = dict(model.named_parameters())
        self._calls = {name: calls for name, parameter in parameters.items() if (calls := trace.calls(parameter))}
        if not any(trace.mixes(parameter) for parameter in parameters.values()):
            others = {id(parameter) for name, parameter in parameters.items() if name not in self._calls}
            self._keep = {number for number, parameter in enumerate(registered) if id(parameter) in others}
        return model

    @torch.no_grad()
    def _drawn(self, name: str) -> Tensor:
        parameter = self._model.get_parameter(name)
        value, without = torch.empty_like(parameter, device="cpu"), parameter.detach()
        set_value(parameter, value)
        try:
            with _random_state(random.Random(f"{self._seed}/{name}").getrandbits(63)):
                for call in self._calls[name]:
                    call.repeat()
        finally:
            set_value(parameter, without)
        return value

    def _build_together(self) -> dict[str, Tensor]:
        with _random_state(self._seed), nullcontext() if self._keep is None else parameters_on_meta(self._keep):
            model = from_config(self._config, dtype=torch.float32)
        return {name: model.get_parameter(name).detach() for name in self._together}


@contextmanager
def _random_state(seed: int) -> Iterator[None]:
    """Seed the CPU's generator alone: `torch.manual_seed` would also reseed every CUDA device."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
