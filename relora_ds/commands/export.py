"""`python -m relora_ds export`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="a run directory")
    parser.add_argument("directory", type=Path, metavar="DIR", help="where to write; new, or empty")


def run(arguments: argparse.Namespace) -> int:
    from relora_ds.interop.export import export_run
    export_run(arguments.run, arguments.directory)
    print(f"{arguments.directory}: load it with AutoModelForCausalLM.from_pretrained")
    return 0
