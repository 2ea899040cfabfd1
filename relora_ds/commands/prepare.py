"""`python -m relora_ds prepare`."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        default="quickstart",
        metavar="RECIPE",
        help="a YAML file, or a shipped recipe (default: %(default)s)",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="where to write; new, or empty")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="override any key of the recipe")


def run(arguments: argparse.Namespace) -> int:
    if "=" in str(arguments.directory):
        raise ValueError(
            f"{arguments.directory} is an override; the directory comes before the overrides: "
            "prepare --config RECIPE DIR section.key=value"
        )
    from relora_ds.config import RecipeError, load_recipe

    recipe = load_recipe(arguments.config, arguments.overrides)
    if recipe.data.source == "pretokenized" and recipe.data.max_tokens is not None:
        raise RecipeError(
            [
                f"data.max_tokens: {recipe.data.max_tokens} does not shorten a pretokenized directory, "
                "which is copied as it is; use data.max_tokens=null here, and set it where you train from "
                "the copy"
            ]
        )
    from relora_ds.training.terminal import quieten_libraries

    quieten_libraries()
    from relora_ds.data import prepare
    from relora_ds.data.pretokenized import write
    from relora_ds.data.tokenizer import load

    prepared = prepare(recipe.data, recipe.seed, recipe.trust_remote_code)
    tokenizer = load(prepared.tokenizer_dir, recipe.trust_remote_code)
    write(prepared.directory, tokenizer, arguments.directory)
    print(
        f"{arguments.directory}: {len(prepared.train):,} training and {len(prepared.validation):,} validation tokens,"
        f" vocabulary {prepared.vocab_size:,}, fingerprint {prepared.fingerprint[:16]}\n"
        f"train from it, here or on another machine: data.source=pretokenized data.path={arguments.directory}"
    )
    return 0
