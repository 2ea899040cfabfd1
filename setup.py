"""How relora_ds is packaged. `pip install .` also installs the recipes, model presets and DeepSpeed configurations."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

# Plain literals: launch_scripts/environment.sh reads them without running this file.
INSTALL_REQUIRES = [
    "deepspeed>=0.19.8,<0.20",  # relora_ds/zero relies on private attributes of this series
    "torch>=2.6",
    "transformers>=5,<6",
    "datasets>=4",  # older ones run the scripts of a dataset
    "huggingface_hub",
    "numpy",
    "protobuf",  # transformers reads sentencepiece tokenizers through it; tensorboard needs it too
    "pyarrow",
    "pydantic",  # the types of DeepSpeed's configurations
    "pyyaml",
    "rich",
    "safetensors",
    "sentencepiece",
    "tensorboard",
    "tokenizers",
    "tqdm",
]
EXTRAS_REQUIRE = {
    # tests/test_packaging.py builds a wheel
    "test": [
        "accelerate>=1.15,<2",
        "bitsandbytes>=0.49",
        "matplotlib",
        "mkdocs>=1.6,<2",
        "mkdocs-material>=9.5,<10",
        "peft",
        "pytest>=8",
        "pytest-xdist>=3.5",
        "ruff==0.17.*",
        "setuptools>=70.1",
    ],
    "lint": ["ruff==0.17.*"],
    "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.5,<10"],
    "plot": ["matplotlib"],
    "peft": ["peft"],
    "quantization": ["bitsandbytes>=0.49"],  # relora.frozen_dtype=nf4
    "liger": ["liger-kernel"],  # model.use_liger_kernel=true
    "trainer": ["accelerate>=1.15,<2"],  # ReLoRACallback, with the Hugging Face Trainer
}


def version() -> str:
    """`__version__` of relora_ds/__init__.py, read as text: importing it is not possible before it is installed."""
    return re.search(r'^__version__ = "([^"]+)"', (HERE / "relora_ds/__init__.py").read_text(), re.MULTILINE)[1]


setup(
    name="relora_ds",
    version=version(),
    description="ReLoRA pre-training on DeepSpeed ZeRO: high-rank training through low-rank updates",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    classifiers=["Typing :: Typed"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["relora_ds", "relora_ds.*"]), "relora_ds.ds_configs"],
    package_dir={"relora_ds.ds_configs": "ds_configs"},  # one copy serves the checkout and the installed package
    package_data={
        "relora_ds": ["py.typed", "recipes/*.yaml"],
        "relora_ds.models": ["*.json"],
        "relora_ds.lab.experiments": ["suites/*.yaml"],
        "relora_ds.ds_configs": ["*.json"],
    },
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
)
