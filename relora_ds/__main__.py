"""`python -m relora_ds <command>`."""

import argparse
import sys
from pathlib import Path


def main() -> int:
    """Dispatch to a command; returns the exit code."""
    if len(sys.argv) > 1 and sys.argv[1] == "train":
        from relora_ds.train import main as train
        return train(sys.argv[2:])
    parser = argparse.ArgumentParser(prog="python -m relora_ds", description="ReLoRA pre-training on DeepSpeed ZeRO.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", help="train a recipe; the same as train.py", add_help=False)
    export = commands.add_parser("export", help="write a finished run as a Hugging Face model directory")
    export.add_argument("run", type=Path, metavar="RUN")
    export.add_argument("directory", type=Path, metavar="DIR")
    arguments = parser.parse_args()

    from relora_ds.interop.export import export_run
    try:
        export_run(arguments.run, arguments.directory)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.directory}: load it with AutoModelForCausalLM.from_pretrained")
    return 0


if __name__ == "__main__":
    sys.exit(main())
