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
    for part in recipe.data.parts():
        if part.source == "pretokenized" and part.max_tokens is not None:
            raise RecipeError(
                [
                    f"data.max_tokens: {part.max_tokens} does not shorten a pretokenized directory, "
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
    corpora = {arguments.directory / part.name: part.data for part in prepared.parts} or {arguments.directory: prepared}
    for directory, corpus in corpora.items():
        write(corpus.directory, tokenizer, directory)
        print(
            f"{directory}: {len(corpus.train):,} training and {len(corpus.validation):,} validation tokens,"
            f" vocabulary {corpus.vocab_size:,}, fingerprint {corpus.fingerprint[:16]}"
        )
    items = [
        f"{{source: pretokenized, path: {arguments.directory / part.name}, weight: {part.weight:g}}}"
        for part in prepared.parts
    ]
    how = f"'data.mix=[{', '.join(items)}]'" if items else f"data.source=pretokenized data.path={arguments.directory}"
    print(f"train from it, here or on another machine: {how}")
    return 0
