"""`python -m relora_ds export`."""

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        metavar="RUN_OR_CHECKPOINT",
        help="a run directory (its end, or its newest checkpoint), or RUN/checkpoints/step_…",
    )
    parser.add_argument("directory", type=Path, metavar="DIR", help="where to write; new, or empty")
    parser.add_argument("--checkpoint", metavar="NAME", help="which checkpoint of the run, such as step_00005000")
    parser.add_argument(
        "--dtype",
        default="fp32",
        choices=["fp32", "bf16", "fp16"],
        help="of the weights that are written (default: %(default)s)",
    )
    parser.add_argument(
        "--format",
        default="hf",
        choices=["hf", "peft"],
        help="hf: the merged model; peft: the current cycle's adapter, its model in DIR/base (default: %(default)s)",
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="for a model whose code is not transformers'")


def run(arguments: argparse.Namespace) -> int:
    from relora_ds.training.terminal import quieten_libraries

    quieten_libraries()
    from relora_ds.interop.hf_export import export

    source = export(
        arguments.source,
        arguments.directory,
        checkpoint=arguments.checkpoint,
        dtype=arguments.dtype,
        format=arguments.format,
        trust_remote_code=arguments.trust_remote_code,
    )
    if arguments.format == "peft":
        how = "PeftModel.from_pretrained, its base is in base/"
    else:
        how = "AutoModelForCausalLM.from_pretrained"
        if "auto_map" in json.loads((arguments.directory / "config.json").read_text(encoding="utf-8")):
            how += ", trust_remote_code=True"
    print(f"{arguments.directory}: {source} in {arguments.dtype}; load it with {how}")
    if not any(arguments.directory.glob("tokenizer*")):
        print("no tokenizer beside the checkpoint: save yours into the directory")
    return 0
