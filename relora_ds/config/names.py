"""Where the shipped recipes, presets, DeepSpeed configurations and methods are, and what they are called."""

import json
from pathlib import Path

PACKAGE_DIR = Path(__file__).parent.parent
# The one copy of the DeepSpeed configurations: inside an installed package, beside the package in a checkout.
_INSTALLED = PACKAGE_DIR / "ds_configs"
DS_CONFIG_DIR = _INSTALLED if _INSTALLED.is_dir() else PACKAGE_DIR.parent / "ds_configs"

# Training methods: a new one is a file in relora_ds/methods and a line here.
METHODS = {
    "full": "relora_ds.methods.full:Full",
    "control": "relora_ds.methods.control:Control",
    "lora": "relora_ds.methods.lora:LoRA",
    "relora": "relora_ds.methods.relora:ReLoRA",
    "galore": "relora_ds.methods.galore:GaLore",
    "switchlora": "relora_ds.methods.switchlora:SwitchLoRA",
    "cola": "relora_ds.methods.cola:CoLA",
    "cola_m": "relora_ds.methods.cola_m:CoLAM",
    "crnet": "relora_ds.methods.crnet:CRNet",
    "fira": "relora_ds.methods.fira:Fira",
    "apollo": "relora_ds.methods.apollo:Apollo",
    "apollo_mini": "relora_ds.methods.apollo_mini:ApolloMini",
    "scale": "relora_ds.methods.scale:Scale",
    "muon": "relora_ds.methods.muon:Muon",
    "sst": "relora_ds.methods.sst:SST",
}


def recipe_names() -> list[str]:
    """Return the names of the shipped recipes."""
    return sorted(path.stem for path in (PACKAGE_DIR / "recipes").glob("*.yaml"))


def preset_names() -> list[str]:
    """Return the names of the shipped model presets, in the file's order (smallest first)."""
    return list(json.loads((PACKAGE_DIR / "models" / "presets.json").read_text()))


def ds_config_names() -> list[str]:
    """Return the names of the shipped DeepSpeed configurations."""
    return sorted(path.stem for path in DS_CONFIG_DIR.glob("*.json"))
