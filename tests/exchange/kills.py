"""Islands whose ranks are killed again and again, and what the server's decisions make of the weights.

python -m tests.exchange.kills --kills 50
"""

import argparse
import json
import os
import random
import signal
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from relora_ds.training.preflight import check
from relora_ds.training.trainer import Trainer
from tests.islands.servers import SECRET, serving
from tests.ranks import Ranks

SIZES = (1, 2)  # ranks of the islands
STEPS, EVERY = 1300, 10
SETTINGS = [
    f"train.steps={STEPS}",
    "warm_start_steps=20",
    f"relora.restart_every={EVERY}",
    "islands.sync_every=5",
    "islands.outer_optimizer=average",
    f"islands.count={len(SIZES)}",
    "checkpoint.every=3",
    "checkpoint.keep_last=1000",  # so that the server keeps all exchanges
    "eval.samples=0",
    "eval.max_tokens=2000",
    "resume=auto",
]
EXCHANGES = 4 + (STEPS - 20) // EVERY


def train(overrides: list[str]) -> bool:
    """On a rank: train to the end."""
    os.environ["RELORA_ISLANDS_SECRET"] = SECRET
    return bool(Trainer(check("tiny", overrides)).fit())


class Island(threading.Thread):
    """Starts a run again until it has come to its end, and kills some of its ranks meanwhile.

    Attributes:
        kills: how many there were, by whether all ranks died.
        error: why it was given up.
    """

    def __init__(self, index: int, directory: Path, address: str, kills: int, chance: random.Random):
        super().__init__()
        self.kills: Counter = Counter()
        self.error: str | None = None
        self._size, self._left, self._chance = SIZES[index], kills, chance
        self._metrics = directory / str(index) / "metrics.jsonl"
        own = [f"run_dir={directory}/{index}", f"islands.index={index}", f"islands.address={address}"]
        self._overrides = own + SETTINGS

    def run(self) -> None:
        for _ in range(10 * self._left + 10):
            world, before = Ranks(self._size), self.kills.total()
            ended = threading.Event()
            killer = threading.Thread(target=self._kill_later, args=(world, ended))
            killer.start()
            try:
                world.run(train, self._overrides, timeout=300)
                return
            except AssertionError as failure:
                if self.kills.total() == before:
                    self.error = str(failure)
                    return
            finally:
                ended.set()
                killer.join()
                world.stop()

    def _kill_later(self, world: Ranks, ended: threading.Event) -> None:
        written = self._written()
        while len(world._workers) < self._size and not ended.wait(0.05):
            pass
        if not self._left:
            return
        if self._chance.random() < 0.2:  # while it starts
            is_over = ended.wait(self._chance.uniform(0.5, 5.0))
        else:  # while it trains or exchanges
            while self._written() <= written and not ended.wait(0.05):
                pass
            is_over = ended.wait(self._chance.uniform(0.0, 1.0))
        if is_over:
            return
        everyone = self._chance.random() < 0.5
        processes = [process for process, _ in world._workers]
        self._left -= 1
        self.kills["all ranks" if everyone else "one rank"] += 1
        for process in processes if everyone else self._chance.sample(processes, 1):
            os.kill(process.pid, signal.SIGKILL)

    def _written(self) -> int:
        return self._metrics.stat().st_size if self._metrics.exists() else 0


def replayed(rounds: Path) -> dict[str, torch.Tensor]:
    """Return the weights that the decisions make, in fp64: means of values, and of products of factors."""
    weights: dict[str, torch.Tensor] = {}
    for directory in sorted(rounds.iterdir()):
        decision = json.loads((directory / "decision.json").read_text())
        total = sum(facts["samples"] for facts in decision["islands"].values())
        means: dict[str, torch.Tensor] = {}
        for island, facts in decision["islands"].items():
            blobs = _blobs(directory / island / decision["incarnations"][island])
            for name in [name for name in blobs if name.endswith(".lora_B")]:
                layer = name.removesuffix(".lora_B")
                blobs[layer] = _product(blobs.pop(name), blobs.pop(f"{layer}.lora_A"), weights[f"{layer}.weight"])
            for name, value in blobs.items():
                means[name] = means.get(name, 0) + facts["samples"] / total * value
        for name, value in means.items():
            if f"{name}.weight" in weights:
                weights[f"{name}.weight"] += value
            else:
                weights[name] = value
    return weights


def _blobs(directory: Path) -> dict[str, torch.Tensor]:
    """Return what an island has sent in a round: 1-D, fp64."""
    found = {}
    for path in sorted(directory.glob("*.json")):
        data, offset = path.with_suffix(".blobs").read_bytes(), 0
        for name, size in json.loads(path.read_text())["index"].items():
            values = np.frombuffer(data, np.float32, size // 4, offset)
            found[name] = torch.from_numpy(values.astype(np.float64))
            offset += size
    return found


def _product(lora_B: torch.Tensor, lora_A: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return B·A (s is 1 in `tiny`), in the shape that `weight` has."""
    r = round((lora_B.numel() * lora_A.numel() / weight.numel()) ** 0.5)
    return (lora_B.view(-1, r) @ lora_A.view(r, -1)).view(-1)


def live(directory: Path, kills: int, seed: int) -> tuple[dict, list[dict]]:
    """Train the islands with so many kills. Return what there was, and the decisions.

    Raises:
        AssertionError: a run was lost, or a merge lost or made twice.
    """
    chance, began = random.Random(seed), time.monotonic()
    with serving(directory / "rounds", timeout_s=5.0) as server:
        each = [kills // len(SIZES) + (index < kills % len(SIZES)) for index in range(len(SIZES))]
        islands = [
            Island(index, directory, server.address, each[index], random.Random(chance.random()))
            for index in range(len(SIZES))
        ]
        for island in islands:
            island.start()
        for island in islands:
            island.join()
    errors = [island.error for island in islands if island.error]
    assert not errors, errors[0]
    history = [json.loads(line) for line in (directory / "rounds" / "history.jsonl").read_text().splitlines()]
    assert [decision["round"] for decision in history] == list(range(1, EXCHANGES + 1))
    expected = replayed(directory / "rounds" / "rounds")
    for index in range(len(SIZES)):
        exported = load_file(directory / str(index) / "export" / "model.safetensors")
        for name, value in exported.items():
            difference = (value.double().view(-1) - expected[name]).norm()
            assert difference <= 1e-5 * value.norm(), f"{name} of island {index} differs by {difference:.1e}"
    counts = sum((island.kills for island in islands), Counter())
    missing = sum(len(decision["missing"]) for decision in history)
    return {**counts, "exchanges": EXCHANGES, "missing": missing, "seconds": round(time.monotonic() - began)}, history


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(live(Path(directory), arguments.kills, arguments.seed)[0]))


if __name__ == "__main__":
    main()
