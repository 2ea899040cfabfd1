"""`client_state`: what a loop of its own saves beside the engine. Values stand in the manifest, tensors in a file.

JSON alone would give lists for tuples, and text for the keys of a dict. So what JSON lacks is an object with one key:
 `{"$tensor": "client/0"}`, `{"$tuple": [...]}`, `{"$dict": [[key, value], ...]}`.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

PREFIX = "client/"
_TENSOR, _TUPLE, _DICT = "$tensor", "$tuple", "$dict"
_REMEDIES = {"ndarray": "torch.from_numpy(it)", "Namespace": "vars(it)", "bytes": "a str"}
_REMEDY = "JSON values, tuples, dicts and tensors, such as those of its state_dict() or item()"


def encode(client_state: dict) -> tuple[dict, dict[str, Tensor]]:
    """Return JSON values and the tensors that they refer to, copied to the CPU.

    Raises:
        ValueError: it holds a value that is no JSON, tuple or tensor; names it.
    """
    tensors: dict[str, Tensor] = {}

    def plain(value: Any, place: str) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, Tensor):
            name = f"{PREFIX}{len(tensors)}"
            tensors[name] = value.detach().to("cpu", copy=True).contiguous()
            return {_TENSOR: name}
        if type(value) in (list, tuple):
            found = [plain(inner, f"{place}[{i}]") for i, inner in enumerate(value)]
            return found if type(value) is list else {_TUPLE: found}
        if isinstance(value, dict):
            found = [[plain(key, place), plain(inner, f"{place}[{key!r}]")] for key, inner in value.items()]
            is_json = all(isinstance(key, str) and not key.startswith("$") for key in value)
            return dict(found) if is_json else {_DICT: found}
        kind = type(value).__name__
        raise ValueError(f"{place}: {kind} cannot be saved; give {_REMEDIES.get(kind, _REMEDY)}")

    if not isinstance(client_state, dict):
        raise ValueError(f"client_state: a {type(client_state).__name__} instead of a dict")
    return plain(client_state, "client_state"), tensors


def decode(value: Any, read: Callable[[str], Tensor]) -> Any:
    """Return what `encode` was given. read: a tensor by its name."""
    if isinstance(value, list):
        return [decode(inner, read) for inner in value]
    if not isinstance(value, dict):
        return value
    match next(iter(value.items()), None):
        case (str() as key, inner) if key == _TENSOR:
            return read(inner).clone()
        case (str() as key, inner) if key == _TUPLE:
            return tuple(decode(part, read) for part in inner)
        case (str() as key, inner) if key == _DICT:
            return {decode(name, read): decode(part, read) for name, part in inner}
    return {key: decode(inner, read) for key, inner in value.items()}
