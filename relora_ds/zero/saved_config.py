"""Write the config.json of a model so that transformers 4 builds the same function from it.

transformers 5 writes the rotary positions under `rope_parameters` alone. transformers 4 does not know that name: it
takes its default base frequency, without scaling, and says nothing. So the names that it reads are written as well.
"""

import copy
import json
import math
from pathlib import Path

from transformers import PreTrainedModel

CONFIG_FILE = "config.json"
# What single families call in transformers 4 what all call the same in transformers 5, which still reads both.
_OTHER_NAMES = {
    "gemma3_text": {"local_theta": "rope_local_base_freq"},
    "gemma3n_text": {"local_theta": "rope_local_base_freq"},
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "gpt_neox_japanese": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
}


def save_model(model: PreTrainedModel, directory: Path | str) -> None:
    """Save a model for transformers 4 and 5: `save_pretrained`, and `with_old_names` in its config.json."""
    model.save_pretrained(directory)
    path = Path(directory) / CONFIG_FILE
    saved = json.loads(path.read_text(encoding="utf-8"))
    both = with_old_names(saved)
    before, after = (type(model.config).from_dict(copy.deepcopy(values)).to_dict() for values in (saved, both))
    if all(after.get(name) == value for name, value in before.items()):  # else transformers 5 would read another model
        path.write_text(json.dumps(both, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def with_old_names(config: dict) -> dict:
    """Return a configuration that transformers 5 saved, with the names of transformers 4 beside the new ones."""
    config = {
        name: with_old_names(value) if name.endswith("_config") and isinstance(value, dict) else _number(value)
        for name, value in config.items()
    }
    old = _rotary(config.get("rope_parameters") or {})
    known = {**config, **old}
    old |= {
        name: known[new] for new, name in _OTHER_NAMES.get(config.get("model_type", ""), {}).items() if new in known
    }
    old.pop("local_theta", None)
    return {**old, **config}


def _rotary(parameters: dict) -> dict:
    """Return `rope_parameters` under the old names: of the layers with full attention, where not all are the same."""
    full, local = parameters.get("full_attention", parameters), parameters.get("sliding_attention") or {}
    if not full or "rope_theta" not in full:
        return {}
    old = {name: full[name] for name in ("rope_theta", "partial_rotary_factor") if name in full}
    scaling = {name: value for name, value in full.items() if name not in old}
    # None rather than absent: some families scale by default.
    old["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    return old | ({"local_theta": local["rope_theta"]} if "rope_theta" in local else {})


def _number(value):
    """Return infinity for the dict that transformers 5 writes in its place; transformers 4 takes it for a dict."""
    if isinstance(value, list):
        return [_number(part) for part in value]
    return math.inf if value == {"__float__": "Infinity"} else value
