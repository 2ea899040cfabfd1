"""Recognize checkpoints in formats that are not read, to say what to do with them.

relora_ds 0.1 had two formats: that of its runs, which is read, and for `engine.save_checkpoint` DeepSpeed's, with files
`relora_*` beside it, which `ds_to_universal` could convert.
"""

from pathlib import Path

from relora_ds.checkpoint import manifest


def refusal(directory: Path) -> str | None:
    """Return why a checkpoint, or all in a directory of checkpoints, cannot be read; None where nothing is known."""
    inner = [directory, *(path for path in directory.glob("*") if path.is_dir())]
    if any((path / manifest.NAME).is_file() for path in inner):
        return None
    for path in inner:
        if (path / "zero").is_dir() and any(path.glob("zero/*/fp32.pt")):
            return (
                f"{path} is a universal checkpoint of DeepSpeed, which is not read; with relora_ds 0.1, export the "
                "weights of the checkpoint that it was made from (python -m relora_ds export DIRECTORY MODEL) and "
                "begin from them"
            )
        if (path / "relora_model.json").is_file():
            return (
                f"{path} is in the format that engine.save_checkpoint of relora_ds 0.1 wrote, which is not read any "
                "more; end that training with 0.1, or export the weights with it (python -m relora_ds export DIRECTORY "
                "MODEL) and begin from them"
            )
        if any(path.glob("*_model_states.pt")):
            return (
                f"{path} is DeepSpeed's own checkpoint, which has no fp32 masters of frozen weights and is not read; "
                "convert its weights with DeepSpeed's zero_to_fp32.py and begin from them"
            )
    return None
