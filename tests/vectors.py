"""Numbers that do not come from here: the files of `tests/fixtures`."""

import json
from pathlib import Path

import torch

FIXTURES = Path(__file__).parent / "fixtures"


def vectors(name):
    """The contents of `NAME.json`; lists become fp64 tensors."""

    def convert(value):
        if isinstance(value, dict):
            return {key: convert(inner) for key, inner in value.items()}
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return [convert(inner) for inner in value]
        return torch.tensor(value, dtype=torch.float64) if isinstance(value, list) else value

    return convert(json.loads((FIXTURES / f"{name}.json").read_text()))
