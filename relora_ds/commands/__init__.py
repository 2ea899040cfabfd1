"""`python -m relora_ds <command>`: one module a command.

Each has `add_arguments(parser)` and `run(arguments) -> exit code`. A command parses, calls what does the work, and
prints; the work itself is in the other rooms. ValueError and OSError become one line and exit code 1 (a `RecipeError`:
2) in `__main__`.
"""

# name -> what it does, one line. `train` is relora_ds/train.py; `relora_ds.lab.commands` has more.
COMMANDS = {
    "train": "train a recipe; the same as train.py",
    "check": "resolve a recipe without training: its calendar, trainable parameters, memory and bytes per step",
    "estimate": "memory and bytes per GPU of a recipe, and memory per host, by ZeRO stage and world size",
    "doctor": "versions, devices and backends of this machine; --link measures the link between the ranks",
    "prepare": "tokenize a recipe's corpus into a directory that other machines can train from",
    "export": "write a run or a checkpoint as a Hugging Face model, or as a PEFT adapter with its base",
    "eval": "validation loss of a run or any Hugging Face model on any corpus, and scores on tasks of lm-eval",
    "islands": "serve: relay the updates between jobs that train by themselves for a round",
    "watch": "how runs are doing, on one screen that is kept up to date; also over ssh",
    "checkpoint": "list, verify and prune the checkpoints of a run",
}
