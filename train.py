"""Train a recipe: `deepspeed --num_gpus 8 train.py --config RECIPE [section.key=value ...]`."""

import sys

from relora_ds.train import main

if __name__ == "__main__":
    sys.exit(main())
