"""The commands that measure, reproduce and draw; see `relora_ds.commands`."""

# name -> what it does, one line
COMMANDS = {
    "bench": "measured comparisons: layers, steps, restarts, memory, bytes, quality; a GPU's first check",
    "reproduce": "the paper's experiments: suites of runs, trained where they are missing, with a table and figures",
    "plot": "what one or more runs learned, in sentences, and figures: PNG, and one self-contained HTML page",
    "spectrum": "singular values of the updates that runs made to their weights, and the ranks they amount to",
}
