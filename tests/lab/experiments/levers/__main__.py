"""Measure variants, each with one seed: see the head of this package."""

import argparse
import json
import time

import torch

from relora_ds.lab.bench.environment import environment_info
from tests.lab.experiments.levers.results import FILE, read
from tests.lab.experiments.levers.training import train
from tests.lab.experiments.levers.variants import VARIANTS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.lab.experiments.levers", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in VARIANTS]:
        parser.error(f"NAME: {unknown[0]!r} is none; there are {', '.join(map(repr, VARIANTS))}")
    torch.set_num_threads(1)
    for name in arguments.names or VARIANTS:
        if (name, arguments.seed) in read():
            continue
        started = time.monotonic()
        loss = train(VARIANTS[name], arguments.seed)
        seconds = round(time.monotonic() - started)
        found = {"variant": name, "seed": arguments.seed, "val_loss": loss, "seconds": seconds}
        with FILE.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**found, "conditions": environment_info()}) + "\n")
        print(f"{name}, seed {arguments.seed}: {loss:.4f} ({seconds} s)", flush=True)


if __name__ == "__main__":
    main()
