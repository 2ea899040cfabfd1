"""Versions of what is installed."""

import importlib.metadata
import platform

from relora_ds import __version__

# What decides which numbers a run gives and which files it writes. Tokenizers that are trained on the corpus differ
# between versions of sentencepiece. The last four need not be installed.
LIBRARIES = (
    "torch",
    "deepspeed",
    "transformers",
    "safetensors",
    "sentencepiece",
    "bitsandbytes",
    "peft",
    "accelerate",
    "liger-kernel",
)


def version_of(distribution: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_versions() -> dict[str, str]:
    """Return the versions of Python, of relora_ds and of those of LIBRARIES that are installed."""
    own = {"python": platform.python_version(), "relora_ds": __version__}
    return own | {name: version for name in LIBRARIES if (version := version_of(name))}
