"""transformers' search for packed documents in the attention mask, left out where there are none to find.

Positions that begin again within a row mean several documents, which must not see each other. transformers looks for
them in every forward, also in positions that it has just counted up itself. On a GPU the host waits for the answer, and
the GPU runs out of work; with flash-attention once more in every layer, where a batch is one row. While torch.compile
traces there is no answer: the mask is always made, and PyTorch's flash kernels take none. (With torch before 2.13,
transformers makes it under torch.compile for another reason as well.)

Where a caller gives no positions, they count up in every causal language model of transformers.
"""

import functools
import importlib
import threading
from collections.abc import Callable

from torch import nn

# Where it searches, and what it returns where there is nothing.
_SEARCHES = (
    ("transformers.masking_utils", "find_packed_sequence_indices", None),
    ("transformers.modeling_flash_attention_utils", "_is_packed_sequence", False),
)


class _Thread(threading.local):
    """Attributes: counted: in the forward that this thread is in, positions count up."""

    counted = False


_thread = _Thread()


def skip_search(forward: Callable) -> Callable:
    """Decorate an engine's forward: no search in a forward of a transformers model that is given no positions."""

    @functools.wraps(forward)
    def without_search(engine, *inputs, **kwargs):
        before, _thread.counted = _thread.counted, _counts_positions(engine.module, inputs, kwargs)
        try:
            return forward(engine, *inputs, **kwargs)
        finally:
            _thread.counted = before

    return without_search


def _counts_positions(model: nn.Module, inputs: tuple, kwargs: dict) -> bool:
    # Others' models may choose positions of their own. Positions may be among several unnamed inputs.
    return (
        type(model).__module__.startswith("transformers.models.")
        and len(inputs) <= 1
        and kwargs.get("position_ids") is None
        and _install()
    )


@functools.cache
def _install() -> bool:
    """Have the searches ask the thread first; once, for good, and as far as this transformers has them."""
    for name, function, nothing_found in _SEARCHES:
        module = importlib.import_module(name)
        if (search := getattr(module, function, None)) is not None:
            setattr(module, function, _unless_counted(search, nothing_found))
    return True


def _unless_counted(search: Callable, nothing_found: None | bool) -> Callable:
    @functools.wraps(search)
    def asked(*args, **kwargs):
        return nothing_found if _thread.counted else search(*args, **kwargs)

    return asked
