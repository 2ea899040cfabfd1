"""Steps, restarts and exchanges over slow links: data parallel beside islands, both by the trainer itself.

Over each link and by each method two hosts of one rank each train the same recipe in two ways:

    data parallel    one run of two ranks, which reduce gradients over the link at every step
    islands          two runs of one rank each, which exchange their updates every few steps

They take equal batches: an island has half of the recipe's, as a rank has. The first cycle of each run only warms up;
of what follows medians are taken:

    step        of the slower host, without those that a restart or exchange follows
    restart     of data parallel
    exchange    of the island across the link from the server; of it `waited` until the server had all updates
    formula     bytes by the sizes of the parameters: of a step or restart on a rank, of an exchange of an island
    kernel      the interfaces' tx_bytes around such a step, see `step_recorder`; mean of both hosts. Those of a restart
                are what its step sends more than others
    payload     the same without headers: tx_bytes - tx_packets x (those of TCP, IP and, without delay, Ethernet)

Exchanges are measured every few steps; the mean step of a cycle of H steps is `step + exchange / H`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from relora_ds.config import load_recipe, method_of
from relora_ds.islands.requirement import require_zmq
from relora_ds.lab.bench import hosts_run
from relora_ds.lab.bench.environment import rows_as_markdown
from relora_ds.lab.bench.island_times import (
    ISLANDS,
    PARALLEL,
    PAUSES,
    mean_rows,
    measured_rows,
    pause_of,
    seconds_of,
    summarised,
)
from relora_ds.lab.bench.simulated_link import SimulatedLink, parse_link

if TYPE_CHECKING:
    from relora_ds.planning.cost import Cost

_RESTARTS = ("relora.restart_every={every}", "relora.restart_warmup_steps=0")
METHODS = {  # their recipe keys
    "full": ("method=full",),
    "relora": ("method=relora", *_RESTARTS),
    "one-sided": ("method=galore", "relora.restart_init=random", "relora.optimizer_reset=rotate", *_RESTARTS),
}
_ISLANDS = ("islands.count=2", f"islands.address={hosts_run.ADDRESS}", "islands.sync_every={every}")
# Nothing is low-rank within a warm start. Evaluations are short: one follows every restart.
_SETTINGS = (
    "warm_start_steps=0",
    "eval.every=null",
    "eval.max_tokens={seq_len}",
    "eval.samples=0",
    "checkpoint.every=null",
    "log.every=1000000",
    "log.to=[]",
    "resume=false",
)
_OF_A_RANK = {"run_dir", "islands.index"}  # keys
_SHORTEST = 4  # steps: of the first three of a run the trainer counts the traffic, which takes time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--links",
        default="1gbit,100mbit/50ms,20mbit/100ms/0.1%",
        metavar="LINK,...",
        help="each a rate, rate/round trip, or rate/round trip/loss (default: 1gbit,100mbit/50ms,20mbit/100ms/0.1%%)",
    )
    parser.add_argument(
        "--methods", default=",".join(METHODS), metavar="METHOD,...", help="of full, relora, one-sided (default: all)"
    )
    parser.add_argument(
        "--recipe",
        "--config",
        default="tiny",
        metavar="RECIPE",
        help="a YAML file, or a shipped recipe (default: %(default)s)",
    )
    parser.add_argument(
        "--every", type=int, default=6, metavar="N", help="steps between restarts or exchanges (default: %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=3, metavar="N", help="medians are of so many exchanges (default: %(default)s)"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="of the recipe; those of islands are theirs alone"
    )


def run(arguments: argparse.Namespace) -> dict:
    """Measure each method in both ways, over one link after the other.

    Raises:
        ValueError: an argument or the recipe cannot be used; no root, iproute2 or pyzmq; or a rank failed.
    """
    from relora_ds.data import prepare

    if arguments.every < _SHORTEST:
        raise ValueError(f"--every: {arguments.every} leaves no step to measure; use {_SHORTEST} or more")
    links = {text: parse_link(text) for text in arguments.links.split(",")}
    methods = arguments.methods.split(",")
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"--methods: {method!r} is none; use some of {','.join(METHODS)}")
    require_zmq()
    runs = [
        _Run(method, way, arguments.recipe, arguments.overrides, arguments.every, arguments.repeats)
        for method in methods
        for way in (PARALLEL, ISLANDS)
    ]
    with SimulatedLink() as link:  # before the corpus is prepared, which may take long
        tcp = _congestion_control(link)
    recipe = runs[0].recipe
    prepare(recipe.data, recipe.seed, recipe.trust_remote_code)  # here, where there is the internet
    rows = []
    for text, spec in links.items():
        with SimulatedLink(spec) as link:
            for one in runs:
                print(f"{text}, {one.method}, {one.way}", file=sys.stderr, flush=True)
                rows.append({"link": text, **asdict(spec), **one.measure(link, spec.header_bytes)})
                print(f"  {_told(rows[-1])}", file=sys.stderr, flush=True)
    shared = {name: getattr(arguments, name) for name in ("recipe", "overrides", "every", "repeats")}
    batch = {"batch_sequences": recipe.batch_sequences, "seq_len": recipe.data.seq_len}
    return {**shared, **batch, "tcp": tcp, "rows": rows}


class _Run:
    """A method in one of the two ways.

    Attributes:
        recipe: of the run, without what the two ranks have each for itself.

    Raises:
        ValueError: the recipe cannot be trained so.
    """

    def __init__(self, method: str, way: str, config: str, overrides: Sequence[str], every: int, repeats: int):
        self.method, self.way, self._config, self._every = method, way, config, every
        world_size = 2 if way == PARALLEL else 1
        self._steps = every * (2 if way == PARALLEL else 1 + repeats)
        shared = [one for one in overrides if not one.startswith("islands.")]
        self.recipe = load_recipe(config, shared)
        settings = [*METHODS[method], *_SETTINGS, f"train.steps={self.recipe.total_steps + self._steps}"]
        if way == ISLANDS:
            batch = f"train.batch_sequences={self.recipe.batch_sequences // 2}"
            shared = [*(one for one in overrides if not one.startswith("train.batch_")), batch]
            settings += _ISLANDS
        settings = [one.format(every=every, seq_len=max(2, self.recipe.data.seq_len)) for one in settings]
        taken = {one.partition("=")[0] for one in settings} | _OF_A_RANK
        if given := taken & {one.partition("=")[0] for one in overrides}:
            raise ValueError(f"{min(given)}: this benchmark sets it; leave it out")
        self._overrides = [*shared, *settings]
        self._cost = self._predicted(world_size)

    def _predicted(self, world_size: int) -> Cost:
        from relora_ds.planning.cost import cost
        from relora_ds.planning.network import network_of
        from relora_ds.training.preflight import resolve

        resolved = resolve(self._config, self._overrides, world_size, to_run=False, cuda_bf16=False)
        return cost(resolved, method_of(resolved.recipe), network_of(resolved.recipe)[0])

    def measure(self, link: SimulatedLink, header_bytes: int) -> dict:
        """Train over a link, and return the medians. header_bytes: of a packet."""
        train = hosts_run.data_parallel if self.way == PARALLEL else hosts_run.two_islands
        with tempfile.TemporaryDirectory() as scratch:
            try:
                records = train(link, self._config, self._overrides, self._steps, Path(scratch))
            except ValueError as error:
                raise ValueError(f"islands: {self.method}, {self.way}: {error}") from error
        return {"method": self.method, "way": self.way, **summarised(records, self._every, self._cost, header_bytes)}


def _told(row: dict) -> str:
    """Return a row in a few words."""
    step = f"{seconds_of(row['step_s'])} a step"
    return step if pause_of(row) == 0 else f"{step}, {seconds_of(pause_of(row))} {PAUSES[row['way']]}"


def _congestion_control(link: SimulatedLink) -> str:
    """Return how TCP reacts to delay and loss on the hosts, e.g. cubic."""
    command = ["ip", "netns", "exec", link.hosts[0], "cat", "/proc/sys/net/ipv4/tcp_congestion_control"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def markdown(result: dict) -> str:
    """Return two tables: what was measured, and the mean step of cycles of several lengths."""
    named = " ".join([result["recipe"], *result["overrides"]])
    head = (
        f"`{named}`, {result['batch_sequences']} x {result['seq_len']} tokens a step on both hosts together; TCP: "
        f"{result['tcp']}; restarts and exchanges every {result['every']} steps, medians of {result['repeats']} "
        "exchanges"
    )
    means = (
        "Mean step with a restart or exchange every H steps; in brackets how many times as fast as full rank's data "
        "parallel, and as the method's own"
    )
    tables = (rows_as_markdown(rows(result["rows"])) for rows in (measured_rows, mean_rows))
    return "\n\n".join(part for pair in zip((head, means), tables, strict=True) for part in pair)
