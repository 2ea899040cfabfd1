"""Random weights, drawn one tensor at a time: each from the seed and its name alone.

The distribution is the family's own: `_init_weights` of transformers runs for the modules that it takes, on a model in
which this one tensor is real. So any rank can draw any tensor, and no rank needs memory for more than one.
"""

import logging
import random
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from relora_ds.models.traced_init import Call, traced_init
from relora_ds.models.without_values import parameters_on_meta

logger = logging.getLogger(__name__)


class RandomWeights:
    """Random fp32 weights of a model; a source of weights as an engine takes it.

    What a constructor computes, or `_init_weights` computes from several parameters, is kept from the start: a few
    vectors, in the few families that have any. A model that cannot be built without values is built whole where its
    weights are read.

    Attributes:
        shapes: of every parameter (tied ones once) and persistent buffer, by name.
        owners: the rank that reads each tensor, where only one should: it builds the whole model. None: any rank can.
    """

    def __init__(self, build: Callable[[], PreTrainedModel], seed: int):
        """Trace the initialisation. build: makes the model in fp32, as `AutoModelForCausalLM.from_config` does."""
        self._build, self._seed = build, seed
        self._calls: dict[str, list[Call]] = {}
        self._kept: dict[str, Tensor] = {}
        self.owners: Mapping[str, int] | None = None
        try:
            with _seeded(seed):
                self._model = self._traced()
        except Exception as error:  # whatever an operation on tensors without values raises in the code of a family
            ...
