"""What pyproject.toml cannot say of relora_ds: a package that lies outside, and README.md for a page of its own."""

import re
from pathlib import Path

from setuptools import find_packages, setup

README = (Path(__file__).parent / "README.md").read_text(encoding="utf-8")

setup(
    packages=[*find_packages(include=["relora_ds", "relora_ds.*"]), "relora_ds.ds_configs"],
    package_dir={"relora_ds.ds_configs": "ds_configs"},  # one copy serves the checkout and the installed package
    # Links into the repository lead nowhere on PyPI: their text stays. Pictures from it go.
    long_description=re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)[^)]*\)", lambda m: "" if m[1] else m[2], README),
    long_description_content_type="text/markdown",
)
