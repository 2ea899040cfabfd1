"""What the drift of a restart is measured on: logits of a few rows of the validation split."""

import inspect
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

SEQUENCES = 4
POSITIONS = 64  # the last ones of each row: whole logits, before and after, could take more memory than training


def drift_probe(engine, tokens: np.ndarray, *, seq_len: int, micro_batch_size: int) -> Callable[[], Tensor] | None:
    """Return a function that returns logits, `[rows, <= 64, vocabulary]`, of the first rows of `tokens`.

    None where `tokens` are less than one row.
    """
    module = engine.module
    rows = min(SEQUENCES, micro_batch_size, len(tokens) // seq_len)
    if not rows:
        return None
    input_ids = torch.from_numpy(tokens[: rows * seq_len].astype("int64")).view(rows, seq_len).to(engine.device)
    # Nearly all models of transformers can leave out the others.
    kept = {"logits_to_keep": POSITIONS} if "logits_to_keep" in inspect.signature(module.forward).parameters else {}
    return lambda: module(input_ids=input_ids, **kept).logits[:, -POSITIONS:].clone()
